"""One recipe at increasing strength, all else equal: the same anchors, partners and noise, for pictures and figures."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from streamaug.config import Recipe
from streamaug.engine import Engine
from streamaug.errors import UsageError
from streamaug.orders import OrderBatch, Planner, Schedule

if TYPE_CHECKING:
    from streamaug.preparation import Prepared

# What a recipe's strength is, and where it is looked at.
_AMOUNTS: dict[str, tuple[str, tuple[float, ...]]] = {
    "noise": ("depth", ()),
    "latent_noise": ("strength", (0.1, 0.2, 0.3, 0.4, 0.6, 0.8)),
    "interpolate": ("t", (0.1, 0.2, 0.3, 0.4, 0.5, 0.75)),
    "embedding": ("alpha", (0.1, 0.2, 0.3, 0.4, 0.6, 0.8)),
    "prompt": ("guidance", (1.0, 1.25, 1.5, 2.0, 3.0, 5.0)),
}


_COLUMNS = 6


@dataclass(frozen=True)
class Swept:
    """A recipe's images at one strength, as ordered.

    images: uint8 [n, C, H, W], rejected ones too; labels: int64 [n]; scores: fp32 [n]; kept: bool [n]; rows: int64
    [n], the bank row of each image's anchor, -1 for none.
    """

    amount: float
    images: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    kept: np.ndarray
    rows: np.ndarray


def find_recipe(recipes: Sequence[Recipe], name: str) -> Recipe:
    """The recipe of a position ("0") or kind ("noise"); a kind that is not configured is taken with its defaults.

    Raises UsageError for anything else.
    """
    if name.isdigit():
        if int(name) < len(recipes):
            return recipes[int(name)]
        raise UsageError(f"--recipe {name}: the configuration has recipes 0 to {len(recipes) - 1}")
    if name not in _AMOUNTS:
        raise UsageError(f"--recipe {name}: expected a recipe's position or its kind: {', '.join(_AMOUNTS)}")
    return next((recipe for recipe in recipes if recipe.kind == name), Recipe.model_validate({"kind": name}))


def strength_of(recipe: Recipe, schedule: Schedule) -> tuple[str, tuple[float, ...]]:
    """What is swept in a recipe of this kind, and at which values: six, or as many depths as the schedule has steps."""
    name, amounts = _AMOUNTS[recipe.kind]
    if recipe.kind == "noise":
        runs = np.unique(np.linspace(1, schedule.steps, _COLUMNS).round().astype(int))
        amounts = tuple(float(run) / schedule.steps for run in runs)
    return name, amounts


def at_strength(recipe: Recipe, amount: float) -> Recipe:
    """The recipe for all classes with its strength at one value, and the others of its ranges at their middles.

    An embedding's partner and noise grow together, as in Diffusion Inversion's ablation (Zhou et al. 2023).
    """
    name = _AMOUNTS[recipe.kind][0]
    middle = {
        key: (sum(value) / 2,) * 2
        for key, value in recipe.model_dump().items()
        if key in ("depth", "guidance", "classifier_guidance")
    }
    together = {name: (amount, amount)} | ({"lambd": (amount, amount)} if recipe.kind == "embedding" else {})
    return recipe.model_copy(update=middle | together | {"classes": None, "weight": 1.0})


def sweep(
    prepared: "Prepared", engine: Engine, recipe: Recipe, amounts: Sequence[float], *, size: int, batches: int = 1
) -> list[Swept]:
    """`batches` batches of `size` images at each strength, the classes in equal shares."""
    found = []
    for amount in amounts:
        planner = _planner(prepared.planner, at_strength(recipe, amount), size)
        made = [_look(engine, planner.batch(k, planner.uniform())) for k in range(batches)]
        found.append(Swept(amount, *(np.concatenate(parts) for parts in zip(*made, strict=True))))
    return found


def anchors(prepared: "Prepared", engine: Engine, recipe: Recipe, rows: np.ndarray) -> np.ndarray | None:
    """What each bank row gives back by itself, uint8 [n, C, H, W]: decoded, or sampled from its inverted latent or
    embedding; None for a recipe that uses no row."""
    if recipe.kind == "prompt":
        return None
    if recipe.rows == "latent":
        latents = prepared.bank.gather("latent", rows).to(engine.device, torch.float32)
        with torch.no_grad():
            decoded = engine.sampler.denoiser.decode(latents)
        return ((decoded.float() + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy()
    planner = _planner(prepared.planner, at_strength(recipe, 0.0), len(rows))
    order = planner.batch(0, planner.uniform())
    order.images["row_a"], order.images["label"] = rows, prepared.bank.labels[rows]
    order.images["row_b"], order.images["label_b"], order.images["interp"] = -1, order.images["label"], 0
    if recipe.rows == "inverted":
        order.images["latent_w"] = (1.0, 0.0, 0.0)
    return _look(engine, order)[0]


def _planner(planner: Planner, recipe: Recipe, size: int) -> Planner:
    """The planner with one recipe, in batches of `size`."""
    return Planner(
        planner.row_labels,
        planner.num_classes,
        planner.schedule,
        [recipe],
        size,
        planner.seed,
        templates=planner.templates,
        inverted_start=planner.inverted_start,
        neighbours=planner.neighbours,
    )


def _look(engine: Engine, order: OrderBatch) -> tuple[np.ndarray, ...]:
    pixels, scores, reasons = engine.look(order)
    return pixels, order.images["label"].copy(), scores, reasons == 0, order.images["row_a"].copy()

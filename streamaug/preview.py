"""The pictures one tunes by: what the stream delivers, and what one recipe does at increasing strength."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from streamaug.config import Config, Recipe
from streamaug.demo.pictures import SampleRow, Sibling, preview_png, samples_png
from streamaug.engine import Engine, build
from streamaug.filtering.judge import pack_state
from streamaug.fits import guides
from streamaug.preparation import Prepared, prepare
from streamaug.stream import Stream
from streamaug.sweep import anchors, find_recipe, strength_of, sweep

if TYPE_CHECKING:
    from streamaug.demo.view import DemoView

_BATCHES = 8
_ROWS = 12

_LEGENDS = {
    "noise": "Depth: the share of the noise schedule that an image is sent back through before it is painted again.",
    "latent_noise": "Strength: the share of fresh noise in the latent that the image was inverted to.",
    "interpolate": "t: the weight of a second image. Given back: what the first image's row makes by itself.",
    "embedding": "Alpha: the weight of a second image's embedding, and of noise in it; every image from fresh noise.",
    "prompt": "Scale of guidance: how strongly the class is insisted on; every image from fresh noise.",
}
_JUDGED = " Under each image: the probability that the judge gives to its class; red: rejected."


def draw_delivered(config: Config, out: Path, count: int, view: "DemoView") -> int:
    """A PNG of `count` images as the stream would deliver them; returns how many."""
    # A batch has one depth: small batches show several.
    size = min(config.stream.batch_size, math.ceil(count / _BATCHES))
    stream = config.stream.model_copy(update={"batch_size": size, "starved": "wait", "manifest": None})
    prepared = prepare(config.model_copy(update={"stream": stream}), progress=view)
    view.phase("making images", total=count)
    with Stream.from_prepared(prepared) as images:
        batch = images.take(count)
    steps = prepared.planner.schedule.steps
    preview_png(batch, out, class_names=prepared.class_names, steps=steps, judged=prepared.judge is not None)
    return len(batch.labels)


def draw_recipe(config: Config, out: Path, name: str, view: "DemoView") -> int:
    """A PNG of one recipe, a row for each source image: itself, what its bank row gives back, and images of increasing
    strength with the judge's scores; returns how many were made.

    name: the recipe's position in the configuration, or its kind. Raises UsageError for one there is not.
    """
    recipe = find_recipe(config.recipes, name).model_copy(update={"classes": None, "weight": 1.0})
    config = Config.model_validate(config.model_dump() | {"recipes": [recipe.model_dump()]})
    prepared = prepare(config, progress=view)
    view.phase("making images")
    engine = engine_of(prepared)
    rows, made = _recipe_rows(prepared, engine, recipe)
    judged = _JUDGED.replace("its class", "either class") if recipe.pairs == "mixed" else _JUDGED
    legend = _LEGENDS[recipe.kind] + (judged if prepared.judge is not None else "")
    samples_png(rows, out, title=f"Recipe {recipe.kind}, at increasing strength", legend=legend)
    return made


def engine_of(prepared: Prepared) -> Engine:
    """The engine that a producer would run, in this process."""
    engine = build(prepared.engine_options)
    if prepared.judge is not None:
        engine.load_judge(0, pack_state(prepared.judge))
    return engine


def _recipe_rows(prepared: Prepared, engine: Engine, recipe: Recipe) -> tuple[list[SampleRow], int]:
    what, amounts = strength_of(recipe, prepared.planner.schedule)
    if recipe.kind == "prompt" and not guides(prepared.config, prepared.model):
        amounts = (1.0,)
    swept = sweep(prepared, engine, recipe, amounts, size=min(_ROWS, len(prepared.class_names)))
    judged = prepared.judge is not None
    heading = {"guidance": "scale"}.get(what, what)  # as wide as a picture
    order = np.argsort(swept[0].labels, kind="stable")
    labels = swept[0].labels
    given_back = anchors(prepared, engine, recipe, swept[0].rows)
    opinion = None if given_back is None else _opinion(engine, given_back, labels)
    source_of = {digest: at for at, digest in enumerate(prepared.labelled.hashes)}
    rows = []
    for at in order:
        row = int(swept[0].rows[at])
        siblings = []
        source = source_of.get(prepared.bank.source_hash(row)) if row >= 0 else None
        if source is not None:
            real = prepared.labelled.images[source]
            (score,), (kept,) = _opinion(engine, real[None], labels[at : at + 1])
            siblings.append(Sibling(real, "real", score, kept))
        if given_back is not None and opinion is not None:
            siblings.append(Sibling(given_back[at], "given back", opinion[0][at], opinion[1][at]))
        siblings += [
            Sibling(
                each.images[at],
                f"{heading} {each.amount:.3g}",
                float(each.scores[at]),
                bool(each.kept[at]) if judged else None,
            )
            for each in swept
        ]
        rows.append(SampleRow(prepared.class_names[labels[at]], None, siblings))
    return rows, sum(len(each.labels) for each in swept)


def _opinion(engine: Engine, images: np.ndarray, labels: np.ndarray) -> tuple[list[float], list[bool | None]]:
    """The judge's score of each of uint8 images [n, C, H, W] as these classes, and whether it lets them through."""
    if engine.judge is None:
        return [0.0] * len(images), [None] * len(images)
    pixels = torch.from_numpy(images).to(engine.device).float() / 127.5 - 1
    scores, reasons = engine.judge.score(pixels, torch.from_numpy(labels.astype(np.int64)).to(engine.device))
    return scores.tolist(), (reasons == 0).tolist()

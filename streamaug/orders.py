"""Orders: what to make, as plain data. The trainer's side plans them; a producer only executes them.

A synthetic image is a pure function of its order, so restarts, several producers, resuming in mid-epoch and making
one image again are all the same act: send the order again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from streamaug.errors import DataError, nearest

if TYPE_CHECKING:
    from streamaug.config import Recipe

_WORD = 2**64 - 1
INTERP_NONE, INTERP_LINEAR, INTERP_SPHERICAL, INTERP_CIRCLE = range(4)
_INTERP = {"linear": INTERP_LINEAR, "spherical": INTERP_SPHERICAL, "circle": INTERP_CIRCLE}

# The bank's tensors that an order's rows can be of; `OrderBatch.origin` is the index.
ORIGINS = ("latent", "inverted")

ORDER_DTYPE = np.dtype(
    [
        ("id", "<i8"),  # unique in a run: k * B + position
        ("label", "<i8"),  # the class asked for
        ("label_b", "<i8"),  # the second class of a mixed label (equal to label when not mixed)
        ("label_mix", "<f4"),  # weight of label_b, in [0, 1]
        ("template", "<i4"),  # which prompt wording, -1 for the bank rows' own embeddings
        ("row_a", "<i8"),  # bank rows of the two anchors, -1 for none
        ("row_b", "<i8"),
        ("interp", "<i4"),  # INTERP_*
        ("t", "<f4"),  # position between the anchors, 0 is row_a
        ("latent_w", "<f4", 3),  # weights of a, b and noise in the starting latent
        ("cond_w", "<f4", 3),  # the same for the conditioning
        ("guidance", "<f4"),  # classifier-free guidance scale, 1 is off
        ("classifier_guidance", "<f4"),  # scale of the judge's gradient, 0 is off
    ]
)
HEAD_DTYPE = np.dtype(
    [("k", "<i8"), ("start", "<i8"), ("plan_version", "<i8"), ("judge_version", "<i8"), ("origin", "<i8")]
)


@dataclass(frozen=True)
class OrderBatch:
    """B orders that are executed together: one shape and one number of solver steps.

    `start` is the solver step at which the images enter the schedule; `images` is a structured array [B] of
    ORDER_DTYPE; `origin` is the index into ORIGINS of the bank's tensor that the rows are of. For spherical and circle
    interpolation `latent_w` is (signal scale, 0, noise scale): the producer measures the angle from the bank in float64
    and fills the first two.
    """

    k: int
    start: int
    plan_version: int
    judge_version: int
    images: np.ndarray
    origin: int = 0

    def __len__(self) -> int:
        return len(self.images)

    @staticmethod
    def nbytes(batch_size: int) -> int:
        return HEAD_DTYPE.itemsize + batch_size * ORDER_DTYPE.itemsize

    def write(self, buffer: memoryview) -> None:
        """Write into a buffer of `nbytes(len(self))` bytes."""
        head = np.frombuffer(buffer, HEAD_DTYPE, count=1)
        head[0] = (self.k, self.start, self.plan_version, self.judge_version, self.origin)
        np.frombuffer(buffer, ORDER_DTYPE, count=len(self), offset=HEAD_DTYPE.itemsize)[:] = self.images

    @classmethod
    def read(cls, buffer: memoryview, batch_size: int) -> OrderBatch:
        """A copy of the batch that `write` put into the buffer."""
        k, start, plan_version, judge_version, origin = np.frombuffer(buffer, HEAD_DTYPE, count=1)[0].tolist()
        images = np.frombuffer(buffer, ORDER_DTYPE, count=batch_size, offset=HEAD_DTYPE.itemsize).copy()
        return cls(k, start, plan_version, judge_version, images, origin)


@dataclass(frozen=True)
class Schedule:
    """How much of a clean image and of noise a latent holds at each solver step.

    signal, noise: float64 [steps + 1]; the latent that enters at step s is signal[s]·image + noise[s]·ξ. Entry
    `steps` is the end of the schedule (clean image). `initial_noise` scales pure noise at step 0.
    """

    signal: np.ndarray
    noise: np.ndarray
    initial_noise: float = 1.0

    @property
    def steps(self) -> int:
        return len(self.signal) - 1

    def start_of(self, depth: float) -> int:
        """The solver step at which an image noised to `depth` (share of the schedule run, 0..1) enters."""
        run = min(max(round(depth * self.steps), 1), self.steps)
        return self.steps - run

    def scale_of(self, start: int) -> float:
        """Standard deviation of a latent at solver step `start`, of images whose own is 1."""
        return self.initial_noise if start == 0 else float(np.hypot(self.signal[start], self.noise[start]))


@dataclass(frozen=True)
class Weights:
    """What the planner favours: one version of it. Rows and classes of weight 0 are never ordered."""

    version: int
    classes: np.ndarray  # float64 [C], any scale
    rows: np.ndarray | None = field(default=None)  # float64 [R], any scale; None is uniform


class Planner:
    """Random access to order batches: `batch(k)` depends on (seed, k, weights) and on nothing else."""

    def __init__(
        self,
        row_labels: np.ndarray,
        num_classes: int,
        schedule: Schedule,
        recipes: Sequence[Recipe],
        batch_size: int,
        seed: int,
        templates: int = 1,
        class_names: Sequence[str] | None = None,
        inverted_start: int = 0,
        neighbours: np.ndarray | None = None,
    ):
        """Raises DataError when a recipe has a class without a bank row, or a class no recipe.

        row_labels: int64 [R], the class of each bank row; templates: how many prompt wordings there are; class_names:
        for recipes that name theirs; inverted_start: the solver step at which inverted latents enter; neighbours:
        int [R, K], the rows of the same class nearest to each, nearest first, -1 where there are fewer.
        """
        self.row_labels = np.asarray(row_labels, dtype=np.int64)
        self.num_classes = num_classes
        self.schedule = schedule
        self.recipes = [recipe for recipe in recipes if recipe.weight > 0]
        self.batch_size = batch_size
        self.seed = seed
        self.templates = templates
        self.inverted_start = inverted_start
        self.neighbours = neighbours
        by_class = np.argsort(self.row_labels, kind="stable")
        bounds = np.searchsorted(self.row_labels[by_class], np.arange(num_classes + 1))
        self.rows_of = [by_class[low:high] for low, high in itertools.pairwise(bounds)]
        self._allowed = served_classes(self.recipes, num_classes, class_names)
        self._shares = np.cumsum([recipe.weight for recipe in self.recipes], dtype=np.float64)
        self._shares /= self._shares[-1]
        for recipe, allowed in zip(self.recipes, self._allowed, strict=True):
            empty = [label for label in np.flatnonzero(allowed).tolist() if len(self.rows_of[label]) == 0]
            if empty and recipe.kind != "prompt":
                raise DataError(
                    f"classes without a bank row: {empty}; recipe '{recipe.kind}' needs an image of every one"
                )
            if recipe.kind in ("interpolate", "embedding") and recipe.pairs == "nearest" and neighbours is None:
                raise DataError("pairs 'nearest' needs the table of neighbours (bank.neighbours.nearest_rows)")

    def uniform(self, version: int = 0) -> Weights:
        return Weights(version, np.ones(self.num_classes))

    def digest(self) -> str:
        """Hash of all that plans depend on besides k and the weights."""
        plan = {
            "recipes": [recipe.model_dump(mode="json") for recipe in self.recipes],
            "allowed": [np.flatnonzero(allowed).tolist() for allowed in self._allowed],
            "signal": self.schedule.signal.tolist(),
            "noise": self.schedule.noise.tolist(),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "classes": self.num_classes,
            "templates": self.templates,
            "inverted_start": self.inverted_start,
        }
        digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode())
        for rows in (self.row_labels, self.neighbours):
            if rows is not None:
                digest.update(hashlib.sha256(np.ascontiguousarray(rows, dtype=np.int64).tobytes()).digest())
        return digest.hexdigest()[:16]

    def batch(self, k: int, weights: Weights, judge_version: int = 0) -> OrderBatch:
        """The k-th batch of orders, B = `batch_size`, under the given weights."""
        rng = np.random.Generator(np.random.Philox(key=np.array([self.seed & _WORD, k & _WORD], dtype=np.uint64)))
        size = self.batch_size
        recipe, class_weights = self._recipe(rng.random(), weights.classes)
        start = self._start(rng, recipe)

        labels = _systematic(rng, class_weights, size)
        rng.shuffle(labels)
        images = np.zeros(size, ORDER_DTYPE)
        images["id"] = k * size + np.arange(size)
        images["label"] = images["label_b"] = labels
        images["guidance"] = rng.uniform(*recipe.guidance, size)
        images["classifier_guidance"] = rng.uniform(*recipe.classifier_guidance, size)
        images["cond_w"] = (1.0, 0.0, 0.0)
        images["row_a"] = images["row_b"] = -1
        amount = rng.uniform(*_AMOUNT[recipe.kind](recipe), size)  # of the partner, or of noise
        if recipe.by_embedding:
            images["template"] = -1
        elif self.templates > 1:
            images["template"] = rng.integers(self.templates, size=size)

        origin = ORIGINS.index(recipe.rows or "latent")
        order = OrderBatch(k, start, weights.version, judge_version, images, origin)
        if recipe.kind == "prompt":
            images["latent_w"] = (0.0, 0.0, self.schedule.initial_noise)
            return order
        for label in np.unique(labels):
            at = np.flatnonzero(labels == label)
            rows = self.rows_of[label]
            row_weights = None if weights.rows is None else weights.rows[rows]
            chosen = _evenly(rng, len(rows), len(at)) if row_weights is None else _systematic(rng, row_weights, len(at))
            rng.shuffle(chosen)
            images["row_a"][at] = rows[chosen]
            if recipe.kind in ("interpolate", "embedding") and recipe.pairs == "same":
                images["row_b"][at] = _partners(rng, rows, row_weights, chosen)
        if recipe.kind in ("interpolate", "embedding") and recipe.pairs == "nearest":
            images["row_b"] = self._neighbours(rng, images["row_a"], recipe.neighbours, weights.rows)
        elif recipe.kind in ("interpolate", "embedding") and recipe.pairs == "mixed":
            images["row_b"] = self._others(rng, labels, class_weights, weights.rows)
        _mix(images, recipe, amount, start, self.schedule, rng)
        paired = images["row_b"] >= 0
        if recipe.pairs == "mixed":
            images["label_b"][paired] = self.row_labels[images["row_b"][paired]]
            images["label_mix"][paired] = amount[paired]
        return order

    def _recipe(self, draw: float, classes: np.ndarray) -> tuple[Recipe, np.ndarray]:
        """The recipe at `draw` in [0, 1), and the weights of the classes in its batches, float64 [C].

        Over many batches every class gets its weight's share of images, and in each class the recipes that are for it
        get theirs.
        """
        if all(allowed.all() for allowed in self._allowed):
            return self.recipes[int(np.searchsorted(self._shares, draw, side="right"))], classes
        joint = np.stack(
            [recipe.weight * allowed for recipe, allowed in zip(self.recipes, self._allowed, strict=True)]
        )  # [recipes, C]
        joint *= classes / joint.sum(0)
        shares = np.cumsum(joint.sum(1))
        if not shares[-1] > 0:
            raise DataError("nothing can be ordered: every weight is 0")
        chosen = int(np.searchsorted(shares / shares[-1], draw, side="right"))
        return self.recipes[chosen], joint[chosen]

    def _start(self, rng: np.random.Generator, recipe: Recipe) -> int:
        if recipe.rows is None:
            return 0
        return self.inverted_start if recipe.rows == "inverted" else self.schedule.start_of(rng.uniform(*recipe.depth))

    def _neighbours(
        self, rng: np.random.Generator, row_a: np.ndarray, count: int, row_weights: np.ndarray | None
    ) -> np.ndarray:
        """One of the `count` nearest usable rows of each row, int64 [B]; -1 where there is none."""
        assert self.neighbours is not None
        near = self.neighbours[row_a].astype(np.int64)  # [B, K]
        usable = near >= 0
        if row_weights is not None:
            usable &= row_weights[near] > 0
        usable &= np.cumsum(usable, 1) <= count
        number = usable.sum(1)
        rank = np.floor(rng.random(len(row_a)) * number)
        at = np.argmax(usable & (np.cumsum(usable, 1) == rank[:, None] + 1), 1)
        return np.where(number > 0, near[np.arange(len(row_a)), at], -1)

    def _others(
        self, rng: np.random.Generator, labels: np.ndarray, classes: np.ndarray, row_weights: np.ndarray | None
    ) -> np.ndarray:
        """A row of another class for each label, the classes drawn by their weights, int64 [B]; -1 if there is none."""
        partners = np.full(len(labels), -1, dtype=np.int64)
        totals: dict[int, np.ndarray] = {}  # of the weights of a class's rows
        for position, label in enumerate(labels):
            share = np.where(np.arange(self.num_classes) == label, 0.0, classes)
            if not share.sum() > 0:
                continue
            other = _draw(rng, np.cumsum(share))
            rows = self.rows_of[other]
            if row_weights is None:
                partners[position] = rows[int(rng.random() * len(rows))]
                continue
            if other not in totals:
                totals[other] = np.cumsum(row_weights[rows])
            partners[position] = rows[_draw(rng, totals[other])]
        return partners


# What a recipe's kind draws for each image besides its rows.
_AMOUNT: dict[str, Callable[[Recipe], tuple[float, float]]] = {
    "noise": lambda recipe: recipe.t,
    "latent_noise": lambda recipe: recipe.strength,
    "interpolate": lambda recipe: recipe.t,
    "embedding": lambda recipe: recipe.alpha,
    "prompt": lambda recipe: recipe.t,
}


def _mix(
    images: np.ndarray,
    recipe: Recipe,
    amount: np.ndarray,
    start: int,
    schedule: Schedule,
    rng: np.random.Generator,
) -> None:
    """Fill in the weights that mix each image's rows and noise into its starting latent and its conditioning."""
    paired = images["row_b"] >= 0
    share = np.where(paired, amount, 0.0)
    if recipe.kind == "latent_noise":
        # Preserves the variance of the noise that an inverted latent is.
        images["latent_w"][:, 0] = np.sqrt(1 - amount**2)
        images["latent_w"][:, 2] = amount * schedule.scale_of(start)
        return
    if recipe.kind == "embedding":
        images["latent_w"] = (0.0, 0.0, schedule.initial_noise)
        images["cond_w"][:, 0] = 1 - share
        images["cond_w"][:, 1] = share
        images["cond_w"][:, 2] = rng.uniform(*recipe.lambd, len(images))
        return
    signal, noise = schedule.signal[start], schedule.noise[start]
    if recipe.rows == "inverted":
        signal, noise = 1.0, 0.0
    images["latent_w"] = (signal, 0.0, noise)
    if recipe.kind == "noise":
        return
    if recipe.rows == "inverted" and not paired.all():
        # Alone in its class, an inverted latent would give its own image back: it is varied by noise instead.
        strength = rng.uniform(*recipe.strength, int((~paired).sum()))
        images["latent_w"][~paired, 0] = np.sqrt(1 - strength**2)
        images["latent_w"][~paired, 2] = strength * schedule.scale_of(start)
    images["t"][paired] = amount[paired]
    images["interp"][paired] = _INTERP[recipe.mode]
    if recipe.mode == "linear":
        images["latent_w"][paired, 0] = signal * (1 - amount[paired])
        images["latent_w"][paired, 1] = signal * amount[paired]
    if recipe.by_embedding and recipe.mode != "circle":
        images["cond_w"][:, 0] = 1 - share
        images["cond_w"][:, 1] = share


def served_classes(recipes: Sequence[Recipe], num_classes: int, names: Sequence[str] | None) -> list[np.ndarray]:
    """Which classes each recipe is for, bool [C]. Raises DataError for an unknown name and a class left out by all."""
    found = []
    for recipe in recipes:
        mask = np.full(num_classes, recipe.classes is None)
        for name in recipe.classes or ():
            if names is None or name not in names:
                raise DataError(
                    f"recipe '{recipe.kind}' is for class '{name}'{nearest(name, names or [])}, which is none "
                    f"of the data's: {', '.join(names or [])[:200]}"
                )
            mask[list(names).index(name)] = True
        found.append(mask)
    left = np.flatnonzero(~np.any(found, axis=0))
    if len(left):
        named = [str(label) if names is None else names[label] for label in left.tolist()]
        raise DataError(f"no recipe is for class {', '.join(named)[:200]}: add one, or one without classes")
    return found


def _partners(
    rng: np.random.Generator, rows: np.ndarray, row_weights: np.ndarray | None, chosen: np.ndarray
) -> np.ndarray:
    """Another usable row of the class for each chosen one (an index into rows), int64 [n]; -1 when it is alone."""
    usable = None if row_weights is None else np.flatnonzero(row_weights > 0)
    count = len(rows) if usable is None else len(usable)
    if count < 2:
        return np.full(len(chosen), -1, dtype=np.int64)
    # A partner's rank is drawn among the others.
    rank = chosen if usable is None else np.searchsorted(usable, chosen)
    other = (rank + rng.integers(1, count, len(chosen))) % count
    return rows[other if usable is None else usable[other]]


def _draw(rng: np.random.Generator, totals: np.ndarray) -> int:
    """One index, drawn by weights of which these are the running totals."""
    if not totals[-1] > 0:
        raise DataError("nothing can be ordered: every weight is 0")
    return int(np.searchsorted(totals, rng.random() * totals[-1], side="right"))


def _evenly(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    """`_systematic` for equal weights of `count` things, of which there may be millions."""
    points = (rng.random() + np.arange(size)) / size * count
    return np.minimum(points.astype(np.int64), count - 1)


def _systematic(rng: np.random.Generator, weights: np.ndarray, size: int) -> np.ndarray:
    """`size` indices whose counts are within one of size · weights / sum(weights) (systematic resampling)."""
    total = float(weights.sum())
    if not total > 0:
        raise DataError("nothing can be ordered: every weight is 0")
    points = (rng.random() + np.arange(size)) / size * total
    chosen = np.searchsorted(np.cumsum(weights), points, side="right")
    return np.minimum(chosen, np.flatnonzero(weights)[-1]).astype(np.int64)


# What can become of an ordered image; the index is the code a producer writes beside it.
REASONS = ("accepted", "non_finite", "no_contrast", "confidently_wrong", "unlikely_label", "too_easy")

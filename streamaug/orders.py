"""Orders: what to make, as plain data. The trainer's side plans them; a producer only executes them.

A synthetic image is a pure function of its order, so restarts, several producers, resuming in mid-epoch and making
one image again are all the same act: send the order again.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from streamaug.config import Recipe
from streamaug.errors import DataError

_WORD = 2**64 - 1
INTERP_NONE, INTERP_LINEAR, INTERP_SPHERICAL, INTERP_CIRCLE = range(4)

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
HEAD_DTYPE = np.dtype([("k", "<i8"), ("start", "<i8"), ("plan_version", "<i8"), ("judge_version", "<i8")])


@dataclass(frozen=True)
class OrderBatch:
    """B orders that are executed together: one shape and one number of solver steps.

    `start` is the solver step at which the images enter the schedule; `images` is a structured array [B] of
    ORDER_DTYPE. For spherical and circle interpolation `latent_w` is (signal scale, 0, noise scale): the producer
    measures the angle from the bank in float64 and fills the first two.
    """

    k: int
    start: int
    plan_version: int
    judge_version: int
    images: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    @staticmethod
    def nbytes(batch_size: int) -> int:
        return HEAD_DTYPE.itemsize + batch_size * ORDER_DTYPE.itemsize

    def write(self, buffer: memoryview) -> None:
        """Write into a buffer of `nbytes(len(self))` bytes."""
        head = np.frombuffer(buffer, HEAD_DTYPE, count=1)
        head[0] = (self.k, self.start, self.plan_version, self.judge_version)
        np.frombuffer(buffer, ORDER_DTYPE, count=len(self), offset=HEAD_DTYPE.itemsize)[:] = self.images

    @classmethod
    def read(cls, buffer: memoryview, batch_size: int) -> "OrderBatch":
        """A copy of the batch that `write` put into the buffer."""
        k, start, plan_version, judge_version = np.frombuffer(buffer, HEAD_DTYPE, count=1)[0].tolist()
        images = np.frombuffer(buffer, ORDER_DTYPE, count=batch_size, offset=HEAD_DTYPE.itemsize).copy()
        return cls(k, start, plan_version, judge_version, images)


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
    ):
        """row_labels: int64 [R], the class of each bank row; templates: how many prompt wordings there are. Raises
        DataError when a class has no rows and a recipe needs one."""
        self.row_labels = np.asarray(row_labels, dtype=np.int64)
        self.num_classes = num_classes
        self.schedule = schedule
        self.recipes = [recipe for recipe in recipes if recipe.weight > 0]
        self.batch_size = batch_size
        self.seed = seed
        self.templates = templates
        self.rows_of = [np.flatnonzero(self.row_labels == label) for label in range(num_classes)]
        self._shares = np.cumsum([recipe.weight for recipe in self.recipes], dtype=np.float64)
        self._shares /= self._shares[-1]
        empty = [label for label, rows in enumerate(self.rows_of) if len(rows) == 0]
        if empty and any(recipe.kind != "generate" for recipe in self.recipes):
            raise DataError(f"classes without a bank row: {empty}; every class needs at least one image")

    def uniform(self, version: int = 0) -> Weights:
        return Weights(version, np.ones(self.num_classes))

    def digest(self) -> str:
        """Hash of all that plans depend on besides k and the weights."""
        plan = {
            "recipes": [recipe.model_dump(mode="json") for recipe in self.recipes],
            "signal": self.schedule.signal.tolist(),
            "noise": self.schedule.noise.tolist(),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "classes": self.num_classes,
            "templates": self.templates,
        }
        rows = hashlib.sha256(self.row_labels.tobytes()).hexdigest()
        return hashlib.sha256((json.dumps(plan, sort_keys=True) + rows).encode()).hexdigest()[:16]

    def batch(self, k: int, weights: Weights, judge_version: int = 0) -> OrderBatch:
        """The k-th batch of orders, B = `batch_size`, under the given weights."""
        rng = np.random.Generator(np.random.Philox(key=np.array([self.seed & _WORD, k & _WORD], dtype=np.uint64)))
        size = self.batch_size
        recipe = self.recipes[int(np.searchsorted(self._shares, rng.random(), side="right"))]
        start = 0 if recipe.kind == "generate" else self.schedule.start_of(rng.uniform(*recipe.depth))

        labels = _systematic(rng, weights.classes, size)
        rng.shuffle(labels)
        images = np.zeros(size, ORDER_DTYPE)
        images["id"] = k * size + np.arange(size)
        images["label"] = images["label_b"] = labels
        images["guidance"] = rng.uniform(*recipe.guidance, size)
        images["classifier_guidance"] = rng.uniform(*recipe.classifier_guidance, size)
        images["cond_w"] = (1.0, 0.0, 0.0)
        images["row_a"] = images["row_b"] = -1
        t = rng.uniform(*recipe.t, size)
        if recipe.conditioning == "embedding":
            images["template"] = -1
        elif self.templates > 1:
            images["template"] = rng.integers(self.templates, size=size)

        if recipe.kind == "generate":
            images["latent_w"] = (0.0, 0.0, self.schedule.initial_noise)
            return OrderBatch(k, start, weights.version, judge_version, images)

        signal, noise = self.schedule.signal[start], self.schedule.noise[start]
        images["latent_w"] = (signal, 0.0, noise)
        for label in np.unique(labels):
            at = np.flatnonzero(labels == label)
            rows = self.rows_of[label]
            row_weights = np.ones(len(rows)) if weights.rows is None else weights.rows[rows]
            chosen = _systematic(rng, row_weights, len(at))
            rng.shuffle(chosen)
            images["row_a"][at] = rows[chosen]
            usable = np.flatnonzero(row_weights > 0)
            if recipe.kind == "interpolate" and len(usable) > 1:
                # A partner is another usable row of the class: its rank is drawn among the others.
                rank = np.searchsorted(usable, chosen)
                other = (rank + rng.integers(1, len(usable), len(at))) % len(usable)
                images["row_b"][at] = rows[usable[other]]
        paired = images["row_b"] >= 0
        images["t"][paired] = t[paired]
        if recipe.mode == "spherical":
            images["interp"][paired] = INTERP_SPHERICAL
        else:
            images["interp"][paired] = INTERP_LINEAR
            images["latent_w"][paired, 0] = signal * (1 - t[paired])
            images["latent_w"][paired, 1] = signal * t[paired]
        return OrderBatch(k, start, weights.version, judge_version, images)


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

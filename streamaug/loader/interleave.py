"""The loader's arithmetic: how many synthetic images each batch gets, exactly, and where they stand in it.

Pure Python and numpy: no torch, no clock, no global random state.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from math import floor

import numpy as np

from streamaug.errors import UsageError

logger = logging.getLogger("streamaug")

_HALF = Fraction(1, 2)


def exact(ratio: float) -> Fraction:
    """The ratio as the decimal fraction it was written as (0.3 is 3/10). Raises UsageError outside [0, 1)."""
    try:
        value = float(ratio)
    except (TypeError, ValueError):
        raise UsageError(f"ratio is a number in [0, 1), got {ratio!r}") from None
    if not 0.0 <= value < 1.0:
        hint = "; without real images: StreamLoader(None, stream, epoch_steps=1000)" if value == 1.0 else ""
        raise UsageError(f"ratio is the synthetic share of the batch, in [0, 1), got {ratio!r}{hint}")
    return _decimal(value)


@lru_cache(maxsize=1024)
def _decimal(value: float) -> Fraction:
    return Fraction(repr(value))


@dataclass
class Share:
    """Keeps the synthetic share of everything delivered within one image of what was asked.

    `debt` is the number of synthetic images asked for so far minus those planned, in [−1/2, 1/2]. Decimal
    ratios have denominators that are powers of ten, so it stays a small and exact fraction.
    """

    debt: Fraction = field(default_factory=Fraction)

    def of_total(self, total: int, ratio: Fraction) -> int:
        """Synthetic images in a delivered batch of `total` images."""
        asked = self.debt + ratio * total
        synthetic = floor(asked + _HALF)
        self.debt = asked - synthetic
        return synthetic

    def beside(self, real: int, ratio: Fraction) -> int:
        """Synthetic images to add to `real` images, so that they are `ratio` of the sum."""
        asked = self.debt + ratio * real
        synthetic = max(0, floor(asked / (1 - ratio) + _HALF))
        self.debt = asked - (1 - ratio) * synthetic
        return synthetic


def deferred_split(share: Share, size: int, left: int | None, ratio: Fraction) -> tuple[int, int]:
    """(real, synthetic) of the next batch of `size` images when no real image may be dropped.

    `left` is the number of real images left in the epoch, None while more than `size`. The last batch is
    short: its share is counted beside the real images that remain.
    """
    before = share.debt
    synthetic = share.of_total(size, ratio)
    if left is None or left >= size - synthetic:
        return size - synthetic, synthetic
    share.debt = before
    return left, share.beside(left, ratio)


def deferred_length(rows: int, size: int, debt: Fraction, ratio_at: Callable[[int], Fraction], step: int) -> int:
    """Batches of an epoch that serves `rows` real images in batches of `size`, starting at `step`."""
    share, batches = Share(debt), 0
    while rows > 0:
        real, _ = deferred_split(share, size, rows, ratio_at(step + batches))
        rows -= real
        batches += 1
    return batches


def say_resolution(ratio: Fraction, total: int) -> None:
    """Log it where a delivered batch of `total` images has less than one synthetic image's worth of the ratio."""
    asked = ratio * total
    if 0 < asked < 1:
        logger.warning(
            "ratio %g of a batch of %d images is %.3g of a synthetic image: one comes every %.3g batches. The "
            "share is exact over time, and larger batches spread it evenly",
            float(ratio),
            total,
            float(asked),
            float(1 / asked),
        )


def places(key: tuple[int, ...], total: int, count: int) -> np.ndarray:
    """int64 [count]: distinct places in a batch of `total`, drawn by `key` (seed, rank, step) alone."""
    return np.random.default_rng(key).permutation(total)[:count]


def image_seeds(key: tuple[int, ...], count: int) -> list[int]:
    """One seed per image for transforms that draw, independent of `places` under the same key."""
    return np.random.SeedSequence((*key, 1)).generate_state(count, np.uint64).tolist()


def batch_seed(key: tuple[int, ...]) -> int:
    """A seed for what is drawn once for a whole batch, independent of the others under the same key."""
    return int(np.random.SeedSequence((*key, 2)).generate_state(1, np.uint64)[0])

"""The synthetic share as a user sets it: a number, a function of the step, or one number for each class.

    StreamLoader(loader, stream, ratio=ratios.warmup(0.5, steps=1000))
    StreamLoader(loader, stream, ratio={"cat": 0.5, "default": 0.2})

Pure Python, exact fractions.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from numbers import Integral
from typing import Any

from streamaug.errors import UsageError, nearest
from streamaug.loader.interleave import exact

ByClass = Mapping[str | int, float]
Ratio = float | Callable[[int], float] | ByClass
DEFAULT = "default"  # the key of all classes that a ratio by class does not name


@dataclass(frozen=True)
class Warmup:
    """`warmup`'s function of the step."""

    ratio: float
    steps: int
    start: float = 0.0

    def __call__(self, step: int) -> float:
        return _between(self.start, self.ratio, step / self.steps)


@dataclass(frozen=True)
class Cosine:
    """`cosine`'s function of the step."""

    ratio: float
    steps: int
    end: float = 0.0
    warmup: int = 0

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return _between(0.0, self.ratio, step / self.warmup)
        done = min((step - self.warmup) / (self.steps - self.warmup), 1.0)
        return _between(self.end, self.ratio, (1 + math.cos(math.pi * done)) / 2)


def warmup(ratio: float, steps: int, start: float = 0.0) -> Warmup:
    """From `start` to `ratio` in a straight line over the first `steps` batches of the run, then `ratio`.

    In YAML: `ratio: {schedule: warmup, ratio: 0.5, steps: 1000}`. Raises UsageError.
    """
    _check_schedule(steps, ratio=ratio, start=start)
    return Warmup(ratio, steps, start)


def cosine(ratio: float, steps: int, end: float = 0.0, warmup: int = 0) -> Cosine:
    """From `ratio` to `end` along half a cosine, reached after `steps` batches of the run, then `end`.

    The first `warmup` of these batches go from 0 to `ratio` in a straight line. In YAML:
    `ratio: {schedule: cosine, ratio: 0.5, steps: 10000, end: 0.1}`. Raises UsageError.
    """
    _check_schedule(steps, ratio=ratio, end=end)
    if not isinstance(warmup, Integral) or not 0 <= warmup < steps:
        raise UsageError(f"warmup is a number of batches from 0 to below steps={steps}, got {warmup!r}")
    return Cosine(ratio, steps, end, int(warmup))


def from_config(value: Any) -> Ratio:
    """The ratio that a configuration or a saved state writes as a number or a mapping; any other as it is."""
    if not isinstance(value, Mapping) or "schedule" not in value:
        return value
    kinds: dict[Any, Callable[..., Ratio]] = {"warmup": warmup, "cosine": cosine}
    rest = {name: one for name, one in value.items() if name != "schedule"}
    if value["schedule"] not in kinds:
        raise UsageError(f"schedule {value['schedule']!r}: accepted are {' and '.join(kinds)}")
    try:
        return kinds[value["schedule"]](**rest)
    except TypeError as error:
        raise UsageError(f"ratio {dict(value)}: {error}") from None


def as_config(ratio: Ratio) -> Any:
    """The ratio as `from_config` reads it, plain numbers, strings and dicts; None for a function of the user's own."""
    if isinstance(ratio, Mapping):
        return {str(key): float(value) for key, value in ratio.items()}
    if isinstance(ratio, Warmup | Cosine):
        return {"schedule": type(ratio).__name__.lower(), **asdict(ratio)}
    return None if callable(ratio) else float(ratio)


class Shares:
    """A ratio as the loader uses it: the share of the whole at each step, and what classes the stream should make.

    ratio: as set by the user; names: the stream's classes; real_names: the same in the order of the real labels, for
    classes given by number. `real_counts()` gives how many real images each class has (any scale), in the stream's
    order; called once, for a ratio by class. Raises UsageError for a ratio outside [0, 1), classes that do not exist,
    or classes left out.

    A class's ratio r is the synthetic share of what is delivered of that class. Beside p real images of it there are
    then p · r / (1 − r) synthetic ones, whichever real images are displaced; the sum over classes gives the share of
    the whole, and the summands are the class weights.
    """

    def __init__(
        self,
        ratio: Ratio,
        names: Sequence[str],
        real_names: Sequence[str],
        real_counts: Callable[[], Sequence[float]],
    ):
        self.ratio = ratio
        self.fixed: Fraction | None = None  # the share of the whole where it is one number
        self._counts = real_counts
        self._whole: Fraction | None = None  # of a ratio by class
        self._weights: list[float] | None = None
        self._by_class: list[Fraction] | None = None  # in the stream's order
        if isinstance(ratio, Mapping):
            self._by_class = _in_order(ratio, names, real_names)
        elif not callable(ratio):
            self.fixed = exact(ratio)

    @property
    def is_fixed(self) -> bool:
        """Whether the share is the same at every step."""
        return not callable(self.ratio)

    def at(self, step: int) -> Fraction:
        """The synthetic share of all that is delivered at a step."""
        if self.fixed is not None:
            return self.fixed
        if self._by_class is None:
            return self._scheduled(step)
        self._resolve()
        assert self._whole is not None
        return self._whole

    def _scheduled(self, step: int) -> Fraction:
        try:
            return exact(self.ratio(step))  # type: ignore[operator]
        except UsageError as error:
            raise UsageError(f"ratio={self.ratio!r} at step {step}: {error}") from None

    def class_weights(self) -> list[float] | None:
        """What delivered classes should follow, in the stream's order; None leaves them as they are by default."""
        self._resolve()
        return self._weights

    def _resolve(self) -> None:
        if self._by_class is None or self._whole is not None:
            return
        counts = [float(count) for count in self._counts()]
        shares = [Fraction(count / sum(counts)).limit_denominator(10**9) for count in counts]
        beside = [share * ratio / (1 - ratio) for share, ratio in zip(shares, self._by_class, strict=True)]
        whole = sum(beside, Fraction())
        self._whole = (whole / (1 + whole)).limit_denominator(10**9)
        self._weights = [float(one) for one in beside] if whole else None


def _in_order(ratio: ByClass, names: Sequence[str], real_names: Sequence[str]) -> list[Fraction]:
    """The ratio of each class in the stream's order."""
    found: dict[str, Fraction] = {}
    default = None
    for key, value in ratio.items():
        try:
            share = exact(value)
        except UsageError as error:
            raise UsageError(f"class {key!r}: {error}") from None
        if key == DEFAULT and DEFAULT not in names:
            default = share
            continue
        name = _name(key, names, real_names)
        if name in found:
            raise UsageError(f"ratio: class {name!r} is given twice, by name and by number")
        found[name] = share
    missing = [name for name in names if name not in found]
    if missing and default is None:
        raise UsageError(
            f"ratio has nothing for {len(missing)} of {len(names)} classes ({_short(missing)}); name them all, or add "
            f"{DEFAULT!r}: 0.0 for the others"
        )
    return [found.get(name, default) for name in names]  # type: ignore[misc]


def _name(key: Any, names: Sequence[str], real_names: Sequence[str]) -> str:
    """The class given by its name, or by its number among the real labels."""
    if isinstance(key, str) and key in names:
        return key
    number = int(key) if isinstance(key, Integral) or (isinstance(key, str) and key.isdigit()) else -1
    if 0 <= number < len(real_names) and real_names[number] in names:
        return real_names[number]
    raise UsageError(
        f"ratio for {key!r}, which is no class{nearest(str(key), names)}; classes: {_short(names)} (or their numbers, "
        f"0 to {len(names) - 1})"
    )


def _check_schedule(steps: int, **ratios: float) -> None:
    if not isinstance(steps, Integral) or steps < 1:
        raise UsageError(f"steps is a number of batches from 1, got {steps!r}")
    for name, value in ratios.items():
        try:
            exact(value)
        except UsageError:
            raise UsageError(f"{name} is a synthetic share in [0, 1), got {value!r}") from None


def _between(low: float, high: float, share: float) -> float:
    """Rounded, so that sums of many different shares stay short fractions."""
    return round(low + (high - low) * min(share, 1.0), 6)


def _short(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(map(repr, names[:most])) + (", ..." if len(names) > most else "")

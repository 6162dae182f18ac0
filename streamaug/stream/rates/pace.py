"""Supply against demand: how many images a second the training loop could use, and what share of them is made."""

import threading
from collections import deque
from dataclasses import dataclass

_WINDOW = 64  # calls of take that count
_FEW = 8  # calls of take before anything is said
_RARE = 20  # the longest of so many pauses is left out: an evaluation, a checkpoint
_TOLERATED = 0.1  # share of its time, or of its images, that a loop may miss without a word


@dataclass(frozen=True)
class Pace:
    """Rates in images a second: of images that pass the judge when producers never wait, and of synthetic images that
    the loop would take if it never had to wait."""

    supply: float
    demand: float
    waiting: float  # share of its time that the loop stood still, lately
    missing: float  # share of what it asked for that was not fresh: served again, or left to real images
    ratio: float | None  # the synthetic share that the loop asks for; None when nobody said it

    @property
    def fed(self) -> float:
        """Share of the demand that producers can meet, in [0, 1]."""
        return min(self.supply / self.demand, 1.0) if self.demand else 1.0

    @property
    def sustainable_ratio(self) -> float | None:
        """The synthetic share at which the loop would run at full speed, on fresh images alone."""
        return None if self.ratio is None else self.ratio * self.fed

    @property
    def too_slow(self) -> bool:
        """Whether producers cannot keep up, and the loop has felt it."""
        return self.fed < 1 - _TOLERATED and max(self.waiting, self.missing) > _TOLERATED


class Demand:
    """Measures what a loop would take if it never waited: what it asks for, by the time that it spends on its own.

    Only of calls from the main thread: any other one reads ahead, and what it waits for nobody else may have to.
    """

    def __init__(self) -> None:
        # By call of take: seconds of the loop's own since the call before, seconds waited, images wanted, fresh ones.
        self._calls: deque[tuple[float, float, int, int]] = deque(maxlen=_WINDOW)
        self._ended: float | None = None

    def took(self, wanted: int, fresh: int, began: float, ended: float, waited: float) -> None:
        """A call of take for so many images ended; times in seconds on one clock."""
        if threading.current_thread() is not threading.main_thread():
            return
        if self._ended is not None and wanted:
            own = max(began - self._ended, 0.0) + max(ended - began - waited, 0.0)
            self._calls.append((own, waited, wanted, fresh))
        self._ended = ended

    @property
    def per_second(self) -> float | None:
        """Images a second; None before a few calls of take."""
        calls = list(self._calls)  # a loop may go on while another thread asks
        if len(calls) < _FEW:
            return None
        pauses = sorted(own for own, *_ in calls)
        usual = pauses[: len(pauses) - len(pauses) // _RARE]
        wanted = sum(wanted for *_, wanted, _ in calls) / len(calls)
        return wanted * len(usual) / max(sum(usual), 1e-9)

    @property
    def seconds(self) -> float:
        """What the calls that count took, with the loop's own time between them."""
        return sum(own + waited for own, waited, *_ in list(self._calls))

    def pace(self, supply: float, ratio: float | None) -> Pace:
        """Against so many images a second. Needs `per_second`."""
        demand, calls = self.per_second, list(self._calls)
        assert demand is not None
        waiting = sum(waited for _, waited, *_ in calls) / max(self.seconds, 1e-9)
        missing = 1 - sum(fresh for *_, fresh in calls) / sum(wanted for *_, wanted, _ in calls)
        return Pace(supply, demand, waiting, missing, ratio)

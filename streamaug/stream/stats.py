"""What a stream did, in figures: counted on the trainer's side as batches arrive and images are delivered."""

import time
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from streamaug.orders import REASONS, OrderBatch
from streamaug.stream.ring import STAGES, Slot


@dataclass(frozen=True)
class StreamStats:
    """A moment's figures. Seconds are seconds, shares are in [0, 1], counts are images unless named
    otherwise."""

    made: int  # generated, whether accepted or not
    accepted: int
    rejected: dict[str, dict[str, int]]  # class -> reason -> images
    delivered: int  # returned by take, images served again included
    reused: int  # of these, served again
    dropped: int  # accepted, but no longer wanted (replan, load_state_dict)
    fresh_share: float
    mean_reuse: float  # how often an image was delivered, on average
    mean_age_seconds: float  # from made to delivered
    acceptance: float
    acceptance_per_class: dict[str, float]
    delivered_per_class: dict[str, int]
    stall_seconds: float  # the trainer waited for images
    wait_p50_seconds: float  # by call of take
    wait_p99_seconds: float
    images_per_second: float  # made, by the wall clock since the first batch was begun
    images_per_second_busy: float  # made, by the time producers were at work, all producers together
    delivered_per_second: float  # by the wall clock since the first batch arrived
    ring_fill: float  # share of the orders in flight that are made and not yet taken
    time_to_first_batch_seconds: float | None
    restarts: int
    stage_seconds: dict[str, float]
    busy_share: float  # of the producers' time
    limit: str  # what limits the rate, in words
    timeline: list[tuple[float, float, int, int]] = field(repr=False)  # (began, ended, k, accepted) since start

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts: ready for JSON."""
        return asdict(self)


class Recorder:
    """Counts what arrives and what is delivered."""

    TIMELINE = 1 << 15  # batches remembered
    RECENT = 64  # batches whose rate counts
    WAITS = 4_096  # calls of take remembered

    def __init__(self, class_names: list[str], producers: int):
        self._names = class_names
        self._producers = producers
        count = len(class_names)
        self._asked = np.zeros(count, np.int64)
        self._accepted = np.zeros(count, np.int64)
        self._delivered = np.zeros(count, np.int64)
        self._rejected = np.zeros((count, len(REASONS)), np.int64)
        self._stage_ns = np.zeros(len(STAGES), np.int64)
        self._busy_ns = 0
        self._span_ns: tuple[int, int] | None = None  # the first began, the last ended
        self._age_ns = 0
        self.batches = 0
        self._seconds: deque[float] = deque(maxlen=self.RECENT)
        self._timeline: deque[tuple[int, int, int, int]] = deque(maxlen=self.TIMELINE)
        self._waits: deque[float] = deque(maxlen=self.WAITS)
        self._stall = 0.0
        self._dropped = 0
        self._reused = 0
        self.started_ns: int | None = None
        self.first_batch_ns: int | None = None

    def started(self) -> None:
        self.started_ns = time.monotonic_ns()

    def arrived(self, order: OrderBatch, slot: Slot) -> tuple[np.ndarray, np.ndarray]:
        """A published batch was seen; returns how many of each class were ordered and accepted, int64 [C]."""
        count = len(self._names)
        labels = order.images["label"]
        asked = np.bincount(labels, minlength=count)
        if slot.abandoned:
            return asked, np.zeros(count, np.int64)
        accepted = asked
        rejected = np.flatnonzero(slot.reasons)
        if len(rejected):
            accepted = asked - np.bincount(labels[rejected], minlength=count)
            np.add.at(self._rejected, (labels[rejected], slot.reasons[rejected]), 1)
        self._asked += asked
        self._accepted += accepted
        began, ended = slot.span_ns
        self.batches += 1
        if self.batches == self._producers + 1:
            self._seconds.clear()  # each producer's first batch also warmed it up
        self._seconds.append((ended - began) / 1e9)
        self._timeline.append((began, ended, order.k, slot.count))
        self._stage_ns += slot.stage_ns
        self._busy_ns += ended - began
        first, last = self._span_ns or (began, ended)
        self._span_ns = min(first, began), max(last, ended)
        if self.first_batch_ns is None:
            self.first_batch_ns = time.monotonic_ns()
        return asked, accepted

    def delivered(self, labels: np.ndarray, ended_ns: int) -> None:
        """Fresh images were copied out of a batch that was made at `ended_ns`."""
        self._delivered += np.bincount(labels, minlength=len(self._names))
        self._age_ns += len(labels) * (time.monotonic_ns() - ended_ns)

    def reused(self, labels: np.ndarray) -> None:
        self._delivered += np.bincount(labels, minlength=len(self._names))
        self._reused += len(labels)

    def dropped(self, images: int) -> None:
        self._dropped += images

    def waited(self, seconds: float) -> None:
        """One call of take stood still for so long."""
        self._waits.append(seconds)
        self._stall += seconds

    @property
    def acceptance(self) -> float:
        return _share(self._accepted.sum(), self._asked.sum())

    def rate(self) -> float | None:
        """Images made per second by all producers together, never waiting; None before the first batch
        arrived.

        From the median over recent batches; those that warmed a producer up count while there are no others.
        """
        if not self._seconds:
            return None
        size = int(self._asked.sum()) / self.batches
        return self._producers * size / max(float(np.median(self._seconds)), 1e-9)

    def summary(self) -> str:
        """Acceptance per class and reason, for the error that nothing passes."""
        lines = []
        for at, name in enumerate(self._names):
            if self._asked[at]:
                why = ", ".join(f"{reason} {n}" for reason, n in self._rejected_of(at).items())
                lines.append(f"  {name}: {self._accepted[at]} of {self._asked[at]} accepted ({why or 'no rejection'})")
        return "\n".join(lines)

    def stats(self, ring_fill: float, restarts: int) -> StreamStats:
        delivered = int(self._delivered.sum())
        fresh = delivered - self._reused
        made = int(self._asked.sum())
        began, ended = self._span_ns or (0, 0)
        wall, busy = (ended - began) / 1e9, self._busy_ns / 1e9
        waits = np.array(self._waits) if self._waits else np.zeros(1)
        start = self.started_ns or 0
        running = (time.monotonic_ns() - self.first_batch_ns) / 1e9 if self.first_batch_ns else 0.0
        stage_seconds = dict(zip(STAGES, (self._stage_ns / 1e9).tolist(), strict=True))
        return StreamStats(
            made=made,
            accepted=int(self._accepted.sum()),
            rejected={name: reasons for at, name in enumerate(self._names) if (reasons := self._rejected_of(at))},
            delivered=delivered,
            reused=self._reused,
            dropped=self._dropped,
            fresh_share=_share(fresh, delivered),
            mean_reuse=delivered / fresh if fresh else 1.0,
            mean_age_seconds=self._age_ns / 1e9 / fresh if fresh else 0.0,
            acceptance=self.acceptance,
            acceptance_per_class={
                name: _share(self._accepted[at], self._asked[at])
                for at, name in enumerate(self._names)
                if self._asked[at]
            },
            delivered_per_class=dict(zip(self._names, self._delivered.tolist(), strict=True)),
            stall_seconds=self._stall,
            wait_p50_seconds=float(np.percentile(waits, 50)),
            wait_p99_seconds=float(np.percentile(waits, 99)),
            images_per_second=made / wall if wall else 0.0,
            images_per_second_busy=self._producers * made / busy if busy else 0.0,
            delivered_per_second=delivered / running if running else 0.0,
            ring_fill=ring_fill,
            time_to_first_batch_seconds=(self.first_batch_ns - start) / 1e9 if self.first_batch_ns else None,
            restarts=restarts,
            stage_seconds=stage_seconds,
            busy_share=min(busy / (wall * self._producers), 1.0) if wall else 0.0,
            limit=self._limit(stage_seconds, wall, busy),
            timeline=[((b - start) / 1e9, (e - start) / 1e9, k, n) for b, e, k, n in self._timeline],
        )

    def _rejected_of(self, at: int) -> dict[str, int]:
        codes = np.flatnonzero(self._rejected[at])
        return {REASONS[code]: int(self._rejected[at, code]) for code in codes}

    def _limit(self, stage_seconds: dict[str, float], wall: float, busy: float) -> str:
        if self.batches < 2:
            return "too early to say"
        since_first = self._stall - (self._waits[0] if self._waits else 0.0)
        if since_first > 0.05 * wall:
            slowest = max(stage_seconds, key=lambda name: stage_seconds[name])
            share = stage_seconds[slowest] / busy if busy else 0.0
            detail = f": {slowest} takes {share:.0%} of its time" if share else ""
            return f"the producer limits training{detail}"
        return f"training limits: producers are busy {min(busy / (wall * self._producers), 1.0):.0%} of the time"


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else 1.0

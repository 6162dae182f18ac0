"""What a stream did, in figures: counted on the trainer's side as batches arrive and images are delivered."""

import time
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from streamaug.orders import REASONS, OrderBatch
from streamaug.stream.ring import STAGES, Slot


@dataclass(frozen=True)
class StageStats:
    """One stage of the way from an order to a training batch: plan and collect are the trainer's, the others run in
    turn in each producer."""

    seconds: float  # at work, all producers together
    images_per_second: float  # while at work, all producers together; 0 where it took no time
    busy_share: float  # of the trainer's time, or of the producers'
    queue_fill: float | None  # of the queue in front of it, mean by call of take; None without a queue of its own


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
    mean_age_steps: float  # calls of take from planned to delivered: how old the feedback is that an image follows
    acceptance: float
    acceptance_per_class: dict[str, float]
    delivered_per_class: dict[str, int]
    stalls: int  # calls of take that had to wait
    stall_seconds: float  # the trainer waited for images
    wait_p50_seconds: float  # by call of take
    wait_p99_seconds: float
    images_per_second: float  # made, by the wall clock since the first batch was begun
    images_per_second_busy: float  # made, by the time producers were at work, all producers together
    delivered_per_second: float  # by the wall clock since the first batch arrived
    ring_fill: float  # share of the orders in flight that are made and not yet taken
    time_to_first_batch_seconds: float | None
    restarts: int
    stages: dict[str, StageStats]
    busy_share: float  # of the producers' time
    limit: str  # what limits the rate, in words
    timeline: list[tuple[float, float, int, int]] = field(repr=False)  # (began, ended, k, accepted) since start

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts: ready for JSON."""
        return asdict(self)

    def line(self) -> str:
        """The figures worth a line in the log."""
        stages = ", ".join(f"{name} {stage.busy_share:.0%}" for name, stage in self.stages.items() if stage.seconds)
        rejected = sum(n for reasons in self.rejected.values() for n in reasons.values())
        return (
            f"{self.delivered:,} images delivered ({self.delivered_per_second:.0f}/s; fresh {self.fresh_share:.0%}, "
            f"reuse {self.mean_reuse:.2f}, age {self.mean_age_steps:.1f} steps, {self.mean_age_seconds:.2g} s); "
            f"{self.made:,} made ({self.images_per_second:.0f}/s), {rejected:,} rejected, {self.dropped:,} dropped; "
            f"waited {self.wait_p50_seconds * 1e3:.3g} ms (median), {self.wait_p99_seconds * 1e3:.3g} ms (p99), "
            f"{self.stalls:,} stalls, {self.stall_seconds:.1f} s in all; busy: {stages}; "
            f"ring {self.stages['collect'].queue_fill or 0:.0%} full; {self.limit}"
        )


class Recorder:
    """Counts what arrives and what is delivered."""

    TIMELINE = 1 << 15  # batches remembered
    RECENT = 64  # batches whose rate counts
    WAITS = 4_096  # calls of take remembered
    REPORT_SECONDS = 60.0  # between two lines in the log

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
        self._age_steps = 0
        self._plan_ns = 0
        self._planned = 0
        self._collect_ns = 0
        self._fill = np.zeros(2)  # sums over calls of take: shares of the orders in flight not yet made, and made
        self.batches = 0
        self._seconds: deque[float] = deque(maxlen=self.RECENT)
        self._timeline = np.full(
            (self.TIMELINE, 4), -1, np.int64
        )  # (began, ended, k, accepted), number n at n % TIMELINE
        self._waits: deque[float] = deque(maxlen=self.WAITS)
        self._first_wait = 0.0
        self._stall = 0.0
        self._stalls = 0
        self._reported = time.monotonic()
        self._dropped = 0
        self._reused = 0
        self.steps = 0  # calls of take that ended
        self.started_ns: int | None = None
        self.first_batch_ns: int | None = None

    def started(self) -> None:
        self.started_ns = time.monotonic_ns()
        self._reported = time.monotonic()

    def planned(self, images: int, took_ns: int) -> None:
        self._planned += images
        self._plan_ns += took_ns

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
        self._timeline[(self.batches - 1) % self.TIMELINE] = began, ended, order.k, slot.count
        self._stage_ns += slot.stage_ns
        self._busy_ns += ended - began
        first, last = self._span_ns or (began, ended)
        self._span_ns = min(first, began), max(last, ended)
        if self.first_batch_ns is None:
            self.first_batch_ns = time.monotonic_ns()
        return asked, accepted

    def delivered(self, labels: np.ndarray, made_ns: int, planned_at: int, began_ns: int, ended_ns: int) -> None:
        """Fresh images of a batch that was planned at step `planned_at` and made at `made_ns` were copied out, between
        `began_ns` and `ended_ns`."""
        self._delivered += np.bincount(labels, minlength=len(self._names))
        self._age_ns += len(labels) * (began_ns - made_ns)
        self._age_steps += len(labels) * (self.steps - planned_at)
        self._collect_ns += ended_ns - began_ns

    def reused(self, labels: np.ndarray) -> None:
        self._delivered += np.bincount(labels, minlength=len(self._names))
        self._reused += len(labels)

    def dropped(self, images: int) -> None:
        self._dropped += images

    def took(self, waited: float, orders_fill: float, ring_fill: float) -> None:
        """A call of take ended that stood still for so many seconds; shares of the orders in flight when it began."""
        if self.steps == 0:
            self._first_wait = waited
        self.steps += 1
        self._waits.append(waited)
        self._stall += waited
        self._stalls += waited > 0
        self._fill += orders_fill, ring_fill

    def report_due(self) -> bool:
        """True once every REPORT_SECONDS."""
        now = time.monotonic()
        if now - self._reported < self.REPORT_SECONDS:
            return False
        self._reported = now
        return True

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

    def stats(self, ring_fill: float, restarts: int, *, timeline: bool = True) -> StreamStats:
        delivered = int(self._delivered.sum())
        fresh = delivered - self._reused
        made = int(self._asked.sum())
        began, ended = self._span_ns or (0, 0)
        wall, busy = (ended - began) / 1e9, self._busy_ns / 1e9
        waits = np.array(self._waits) if self._waits else np.zeros(1)
        start = self.started_ns or 0
        running = (time.monotonic_ns() - self.first_batch_ns) / 1e9 if self.first_batch_ns else 0.0
        stages = self._stages(made, fresh, wall, running)
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
            mean_age_steps=self._age_steps / fresh if fresh else 0.0,
            acceptance=self.acceptance,
            acceptance_per_class={
                name: _share(self._accepted[at], self._asked[at])
                for at, name in enumerate(self._names)
                if self._asked[at]
            },
            delivered_per_class=dict(zip(self._names, self._delivered.tolist(), strict=True)),
            stalls=self._stalls,
            stall_seconds=self._stall,
            wait_p50_seconds=float(np.percentile(waits, 50)),
            wait_p99_seconds=float(np.percentile(waits, 99)),
            images_per_second=made / wall if wall else 0.0,
            images_per_second_busy=self._producers * made / busy if busy else 0.0,
            delivered_per_second=delivered / running if running else 0.0,
            ring_fill=ring_fill,
            time_to_first_batch_seconds=(self.first_batch_ns - start) / 1e9 if self.first_batch_ns else None,
            restarts=restarts,
            stages=stages,
            busy_share=min(busy / (wall * self._producers), 1.0) if wall else 0.0,
            limit=self._limit(stages, wall, busy),
            timeline=[((b - start) / 1e9, (e - start) / 1e9, k, n) for b, e, k, n in self._latest()]
            if timeline
            else [],
        )

    def _latest(self) -> list[list[int]]:
        at = self.batches % self.TIMELINE
        if self.batches <= self.TIMELINE:
            return self._timeline[: self.batches].tolist()
        return np.roll(self._timeline, -at, axis=0).tolist()

    def _stages(self, made: int, fresh: int, wall: float, running: float) -> dict[str, StageStats]:
        orders_fill, ring_fill = (self._fill / max(self.steps, 1)).tolist()

        def stage(ns: int, images: int, time_there: float, queue_fill: float | None) -> StageStats:
            seconds = ns / 1e9
            rate = images / seconds if seconds else 0.0
            return StageStats(seconds, rate, min(seconds / time_there, 1.0) if time_there else 0.0, queue_fill)

        stages = {"plan": stage(self._plan_ns, self._planned, running, None)}
        for at, name in enumerate(STAGES):
            stages[name] = stage(
                int(self._stage_ns[at]), made, wall * self._producers, orders_fill if at == 0 else None
            )
        return stages | {"collect": stage(self._collect_ns, fresh, running, ring_fill)}

    def _rejected_of(self, at: int) -> dict[str, int]:
        codes = np.flatnonzero(self._rejected[at])
        return {REASONS[code]: int(self._rejected[at, code]) for code in codes}

    def _limit(self, stages: dict[str, StageStats], wall: float, busy: float) -> str:
        if self.batches < 2:
            return "too early to say"
        if self._stall - self._first_wait > 0.05 * wall:
            slowest = max(STAGES, key=lambda name: stages[name].seconds)
            share = stages[slowest].seconds / busy if busy else 0.0
            detail = f": {slowest} takes {share:.0%} of its time" if share else ""
            return f"the producer limits training{detail}"
        return f"training limits: producers are busy {min(busy / (wall * self._producers), 1.0):.0%} of the time"


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else 1.0

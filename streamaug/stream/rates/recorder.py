"""Counts what a stream does, on the trainer's side, as batches arrive and images are delivered."""

import time
from collections import deque
from collections.abc import Callable

import numpy as np

from streamaug.orders import REASONS, OrderBatch
from streamaug.stream.rates.pace import Demand, Pace
from streamaug.stream.rates.stats import StageStats, StreamStats
from streamaug.stream.ring import STAGES, Slot

_SAMPLE = STAGES.index("sample")
_TRAINERS = ("plan", "collect")  # the stages on the trainer's side
_SHORT = 0.05  # share of its time, or of its images, that a loop must miss before the producer is said to limit it
_OWN = 0.1  # share of the trainer's time from which a stage of its own is named
_AMPLE = 1.25  # times what the loop uses: producers that could feed as much are not why it waits
_MOSTLY_REJECTED = 0.5  # acceptance below which the judge is named
_MANY = 64  # calls of take before that, which begin with more planning than the others


class Recorder:
    """Counts what arrives and what is delivered."""

    TIMELINE = 1 << 15  # batches remembered
    RECENT = 64  # batches whose rate counts
    WAITS = 4_096  # calls of take remembered
    REPORT_SECONDS = 60.0  # between two lines in the log

    def __init__(self, class_names: list[str], producers: int, sharers: Callable[[], int] | None = None):
        """sharers: how many ranks the producers make images for now, this one included."""
        self._names = class_names
        self._producers = producers
        self._sharers = sharers or (lambda: 1)
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
        self._warming: list[tuple[float, float, int, int]] = []  # of each producer's first batch, as below
        # Of recent batches: seconds, of them in sampling, solver steps, accepted images.
        self._times: deque[tuple[float, float, int, int]] = deque(maxlen=self.RECENT)
        self.demand = Demand()
        self._wanted = 0  # images asked for
        self._fresh = 0  # delivered for the first time
        self._fresh_before = 0  # the same as the last call of take ended
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
        self._timeline[(self.batches - 1) % self.TIMELINE] = began, ended, order.k, slot.count
        self._stage_ns += slot.stage_ns
        self._busy_ns += ended - began
        first, last = self._span_ns or (began, ended)
        self._span_ns = min(first, began), max(last, ended)
        if self.first_batch_ns is None:
            self.first_batch_ns = ended
        return asked, accepted

    def made(self, slot: Slot, evaluations: int, *, first: bool) -> None:
        """A batch was published whose images took so many solver steps; first: of its producer, which it warmed up."""
        began, ended = slot.span_ns
        times = (ended - began) / 1e9, int(slot.stage_ns[_SAMPLE]) / 1e9, evaluations, slot.count
        (self._warming if first else self._times).append(times)

    def delivered(self, labels: np.ndarray, made_ns: int, planned_at: int, began_ns: int, ended_ns: int) -> None:
        """Fresh images of a batch that was planned at step `planned_at` and made at `made_ns` were copied out, between
        `began_ns` and `ended_ns`."""
        self._delivered += np.bincount(labels, minlength=len(self._names))
        self._fresh += len(labels)
        self._age_ns += len(labels) * (began_ns - made_ns)
        self._age_steps += len(labels) * (self.steps - planned_at)
        self._collect_ns += ended_ns - began_ns

    def reused(self, labels: np.ndarray) -> None:
        self._delivered += np.bincount(labels, minlength=len(self._names))
        self._reused += len(labels)

    def dropped(self, images: int) -> None:
        self._dropped += images

    def took(self, wanted: int, began: float, ended: float, waited: float, queues: tuple[float, float]) -> None:
        """A call of take for so many images ended, which stood still for `waited` seconds. began, ended: seconds on
        time.monotonic's clock; queues: shares of the orders in flight when it began, not yet made and made."""
        if self.steps == 0:
            self._first_wait = waited
        self.steps += 1
        self._waits.append(waited)
        self._stall += waited
        self._stalls += waited > 0
        self._fill += queues
        self.demand.took(wanted, self._fresh - self._fresh_before, began, ended, waited)
        self._wanted += wanted if self._fresh else 0  # what was asked for before the first image is no measure
        self._fresh_before = self._fresh

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

    @property
    def is_warm(self) -> bool:
        """Whether a batch was made that no producer was warmed up by."""
        return bool(self._times)

    def rate(self, evaluations: float | None = None) -> float | None:
        """Images that pass the judge per second, of all producers together, never waiting; None before the first batch.
        Of producers that several ranks share, this rank's part while each of them asks for all it can get.

        From recent batches; those that warmed a producer up count while there are no others. evaluations: solver steps
        of a batch, for a rate at these instead of at those that the recent batches happened to have.
        """
        times = np.array(self._times or self._warming)
        if not len(times):
            return None
        seconds, sampling, steps, accepted = times.T
        if evaluations is not None:
            seconds = seconds + sampling * (evaluations / steps - 1)
        return self._producers / self._sharers() * float(accepted.mean()) / max(float(seconds.mean()), 1e-9)

    def pace(self, ratio: float | None) -> Pace | None:
        """What producers make against what the loop asks for; None before there are figures of both."""
        rate, demand = self.rate(), self.demand.per_second
        return None if rate is None or demand is None else self.demand.pace(rate, ratio)

    def share_of(self, stage: str) -> float:
        """Of the time that producers were at work, in [0, 1]."""
        return float(self._stage_ns[STAGES.index(stage)] / self._busy_ns) if self._busy_ns else 0.0

    def summary(self) -> str:
        """Acceptance per class and reason, for the error that nothing passes."""
        lines = []
        for at, name in enumerate(self._names):
            if self._asked[at]:
                why = ", ".join(f"{reason} {n}" for reason, n in self._rejected_of(at).items())
                lines.append(f"  {name}: {self._accepted[at]} of {self._asked[at]} accepted ({why or 'no rejection'})")
        return "\n".join(lines)

    def stats(
        self, ring_fill: float, restarts: int, *, asked_ratio: float | None = None, timeline: bool = True
    ) -> StreamStats:
        delivered, fresh = self._fresh + self._reused, self._fresh
        made = int(self._asked.sum())
        began, ended = self._span_ns or (0, 0)
        wall, busy = (ended - began) / 1e9, self._busy_ns / 1e9
        waits = np.array(self._waits) if self._waits else np.zeros(1)
        start = self.started_ns or 0
        running = (time.monotonic_ns() - self.first_batch_ns) / 1e9 if self.first_batch_ns else 0.0
        stages = self._stages(made, fresh, wall, running)
        pace = self.pace(asked_ratio)
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
            supply_per_second=self.rate(),
            demand_per_second=self.demand.per_second,
            asked_ratio=asked_ratio,
            sustainable_ratio=None if pace is None else pace.sustainable_ratio,
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
        stood_still = self._stall - self._first_wait > _SHORT * wall
        if stood_still or self._fresh < (1 - _SHORT) * self._wanted:
            pace = self.pace(None)
            if pace is not None and pace.supply > _AMPLE * pace.demand:
                return (
                    f"batches in flight limit training: producers could feed {pace.supply:,.0f}/s and it uses "
                    f"{pace.demand:,.0f}/s, yet it waits; more stream.in_flight evens that out"
                )
            slowest = max(STAGES, key=lambda name: stages[name].seconds)
            share = stages[slowest].seconds / busy if busy else 0.0
            detail = f": {slowest} takes {share:.0%} of its time" if share else ""
            if self.acceptance < _MOSTLY_REJECTED:
                detail += f"; the judge rejects {1 - self.acceptance:.0%} of what is made"
            return f"the producer limits training{detail}"
        own = max(_TRAINERS, key=lambda name: stages[name].busy_share)
        named = self.steps >= _MANY and stages[own].busy_share > _OWN
        detail = f"; {own} takes {stages[own].busy_share:.0%} of the trainer's" if named else ""
        share = min(busy / (wall * self._producers), 1.0)
        for_whom = "" if self._sharers() == 1 else " with this rank's images"
        return f"training limits: producers are busy {share:.0%} of the time{for_whom}{detail}"


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else 1.0

"""What a stream did, in figures."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

_LISTED = 3  # classes named in a line of the log


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
    """A moment's figures. Seconds are seconds, shares are in [0, 1], counts are images unless named otherwise.

    An image that was made is rejected, dropped, delivered, or in the rest of the batch that is being delivered from.
    Whole batches that wait in the ring are not counted yet.
    """

    made: int  # generated, whether accepted or not
    accepted: int
    rejected: dict[str, dict[str, int]]  # class -> reason -> images
    delivered: int  # returned by take, images served again included
    reused: int  # of these, served again
    dropped: int  # accepted, but not wanted: by a replan or load_state_dict, or delivered before the run was resumed
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
    supply_per_second: float | None  # images that pass the judge when producers never wait; None before the first
    demand_per_second: float | None  # images that the loop would take if it never waited; None where unknown
    asked_ratio: float | None  # the loop's synthetic share; None when nobody said it
    sustainable_ratio: float | None  # the asked one, or less where it makes the loop wait; None while unknown
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
        stages = ", ".join(
            f"{name} {stage.busy_share:.0%} at {stage.images_per_second:,.0f}/s"
            for name, stage in self.stages.items()
            if stage.seconds
        )
        return (
            f"{self.delivered:,} images delivered ({self.delivered_per_second:.0f}/s; fresh {self.fresh_share:.0%}, "
            f"reuse {self.mean_reuse:.2f}, age {self.mean_age_steps:.1f} steps, {self.mean_age_seconds:.2g} s); "
            f"{self.made:,} made ({self.images_per_second:.0f}/s), {self._rejections()}, {self.dropped:,} dropped; "
            f"{_rate(self.supply_per_second)} could be fed, {_rate(self.demand_per_second)} used; "
            f"waited {self.wait_p50_seconds * 1e3:,.1f} ms (median), {self.wait_p99_seconds * 1e3:,.1f} ms (p99), "
            f"{self.stalls:,} stalls, {self.stall_seconds:.1f} s in all; busy: {stages}; "
            f"ring {self.stages['collect'].queue_fill or 0:.0%} full; {self.limit}"
        )

    def _rejections(self) -> str:
        """How many were rejected, why, and which classes most."""
        by_class = {name: sum(reasons.values()) for name, reasons in self.rejected.items()}
        by_reason: Counter[str] = Counter()
        for reasons in self.rejected.values():
            by_reason.update(reasons)
        total = f"{sum(by_class.values()):,} rejected"
        if not by_class:
            return total
        why = ", ".join(f"{reason} {n:,}" for reason, n in by_reason.most_common())
        most = ", ".join(f"{name} ({n:,})" for name, n in Counter(by_class).most_common(_LISTED))
        return f"{total} ({why}; most of class {most})"


def _rate(per_second: float | None) -> str:
    return "?" if per_second is None else f"{per_second:,.0f}/s"

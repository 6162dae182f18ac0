"""What is ordered next: always `in_flight` batches ahead, each with the versions of weights and judge that it names.

Batch k is fixed by what was known when the batch `in_flight` places before it had been delivered to its end.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np

from streamaug.errors import UsageError
from streamaug.orders import OrderBatch, Planner, Weights
from streamaug.stream import arrays
from streamaug.stream.position import Position
from streamaug.stream.steering import Steering

_LOOK_AHEAD = 32  # batches whose depths say what a batch takes on average


@dataclass(eq=False)
class Planned:
    """An order whose images were not all delivered yet."""

    order: OrderBatch
    planned_at: int  # calls of take there had been
    offset: int = 0  # accepted images delivered so far
    ring: int = -1
    number: int = -1  # its number in that ring, -1 before it is to be written there

    @property
    def name(self) -> tuple[int, int, int]:
        return self.order.k, self.order.plan_version, self.order.judge_version


class Plan:
    """The batches that are not delivered to their end, in the order of delivery, and all that decides the next ones."""

    def __init__(self, planner: Planner, in_flight: int, *, rank: int, world_size: int, first_judge: np.ndarray | None):
        """Rank r of `world_size` plans the batches k = r modulo world_size. first_judge: uint8 [n], version 0."""
        self.undelivered: deque[Planned] = deque()
        self.empty_run = 0  # batches without an accepted image up to here
        self.judges: dict[int, np.ndarray] = {}  # the versions that undelivered orders name, and the latest
        self._planner = planner
        self._in_flight = in_flight
        self._rank, self._world_size = rank, world_size
        self._first_judge = first_judge
        self._latest_judge = 0
        self._next_k = rank
        self._steering = Steering(np.ones(planner.num_classes))
        self._row_weights: np.ndarray | None = None
        self._weights = {0: Weights(0, self._steering.classes(), None)}  # likewise
        self._latest_weights = 0
        if first_judge is not None:
            self.judges[0] = first_judge

    @property
    def is_short(self) -> bool:
        return len(self.undelivered) < self._in_flight

    def add(self, step: int) -> Planned:
        """Plan one batch more; step: calls of take there have been."""
        order = self._planner.batch(self._next_k, self._current_weights(), self._latest_judge)
        self.undelivered.append(Planned(order, step))
        self._next_k += self._world_size
        self._forget_unnamed()
        return self.undelivered[-1]

    def consumed(self, batch: Planned, asked: np.ndarray, accepted: np.ndarray) -> None:
        """A batch was delivered to its end: int64 [C] how many of each class were ordered and accepted."""
        self.undelivered.remove(batch)
        self._steering.consumed(asked, accepted)
        self.empty_run = 0 if accepted.any() else self.empty_run + 1

    def _current_weights(self) -> Weights:
        classes = self._steering.classes()
        if not np.array_equal(classes, self._weights[self._latest_weights].classes):
            self._latest_weights += 1
            self._weights[self._latest_weights] = Weights(self._latest_weights, classes, self._row_weights)
        return self._weights[self._latest_weights]

    def _forget_unnamed(self) -> None:
        plans = {self._latest_weights, *(batch.order.plan_version for batch in self.undelivered)}
        judges = {self._latest_judge, *(batch.order.judge_version for batch in self.undelivered)}
        self._weights = {version: kept for version, kept in self._weights.items() if version in plans}
        self.judges = {version: kept for version, kept in self.judges.items() if version in judges}

    # What changes it.

    def feedback(self, labels: Any, losses: Any, ids: Any) -> None:
        self._steering.observe(*arrays.feedback(labels, losses, ids, self._planner.num_classes))

    def publish_judge(self, state: Any) -> int:
        """Raises UsageError for a state unlike the first, or when there was none."""
        if self._first_judge is None:
            raise UsageError("this stream has no live judge: it was made without a judge_state")
        self.judges[self._latest_judge + 1] = arrays.judge_bytes(state, len(self._first_judge))
        self._latest_judge += 1
        return self._latest_judge

    def switch(self, classes: np.ndarray | None, rows: np.ndarray | None, first_k: int | None) -> None:
        """Begin anew with other weights, at this rank's first batch from `first_k`, or after the last one planned.

        Raises UsageError when first_k is no number of a batch.
        """
        if first_k is not None and not (isinstance(first_k, Integral) and first_k >= 0):
            raise UsageError(f"replan: first_k is the number of a batch, from 0, got {first_k!r}")
        k = self._next_k if first_k is None else int(first_k)
        steering = Steering(np.ones(self._planner.num_classes) if classes is None else classes)
        latest = self._latest_weights + 1
        self._set(
            Position(
                undelivered=[],
                offsets=[],
                next_k=k + (self._rank - k) % self._world_size,
                empty_run=0,
                weights={latest: Weights(latest, steering.classes(), rows)},
                latest_weights=latest,
                row_weights=rows,
                judges=self.judges,
                latest_judge=self._latest_judge,
                steering=steering,
            ),
            deque(),
        )

    # Where it is.

    def continues(self, position: Position) -> bool:
        """Whether batches were planned since then and none was delivered to its end."""
        names = [batch.name for batch in self.undelivered]
        before = len(position.undelivered)
        planned = (len(names) - before) * self._world_size
        return names[:before] == position.undelivered and self._next_k == position.next_k + planned

    def position(self) -> Position:
        return Position(
            undelivered=[batch.name for batch in self.undelivered],
            offsets=[batch.offset for batch in self.undelivered],
            next_k=self._next_k,
            empty_run=self.empty_run,
            weights=dict(self._weights),
            latest_weights=self._latest_weights,
            judges=dict(self.judges),
            latest_judge=self._latest_judge,
            row_weights=self._row_weights,
            steering=self._steering.copy(),
        )

    def go_to(self, position: Position, step: int) -> None:
        """Go on from there; step: calls of take there have been."""
        orders = (self._planner.batch(k, position.weights[plan], judge) for k, plan, judge in position.undelivered)
        undelivered = deque(
            Planned(order, step, offset) for order, offset in zip(orders, position.offsets, strict=True)
        )
        self._set(position, undelivered)

    def _set(self, position: Position, undelivered: deque[Planned]) -> None:
        judges = {} if self._first_judge is None else position.judges | {0: self._first_judge}
        # Nothing from here on can fail, or be interrupted by a signal: the plan is the old one or the new one.
        self.undelivered, self.empty_run, self._next_k = undelivered, position.empty_run, position.next_k
        self.judges, self._latest_judge = judges, position.latest_judge
        self._weights, self._latest_weights = position.weights, position.latest_weights
        self._row_weights, self._steering = position.row_weights, position.steering

    # What it asks of producers.

    def evaluations(self, order: OrderBatch) -> int:
        """Solver steps that its images go through."""
        return self._planner.schedule.steps - order.start

    def mean_evaluations(self) -> float:
        """The same, on average over the batches to come: batches enter the schedule at depths of their own."""
        ks: Sequence[int] = range(self._next_k, self._next_k + _LOOK_AHEAD)
        orders = (self._planner.batch(k, self._weights[self._latest_weights]) for k in ks)
        return float(np.mean([self.evaluations(order) for order in orders]))

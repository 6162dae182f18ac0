"""Images out of the rings' slots into the caller's batch: in their order, counted, recorded, and again when starved."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from streamaug.config import StreamConfig
from streamaug.errors import EverythingRejected, StreamaugError
from streamaug.stream.batch import Recent, SynthBatch
from streamaug.stream.dispatch import Dispatch
from streamaug.stream.manifest import ManifestWriter
from streamaug.stream.plan import Plan, Planned
from streamaug.stream.producers.fleet import Fleet
from streamaug.stream.rates.recorder import Recorder

NAP_SECONDS = 0.1  # what a lost wake-up costs at most


@dataclass
class _Call:
    """A call of take in progress."""

    out: SynthBatch
    filled: int = 0  # images copied
    fresh: int = 0  # of these, out of slots
    waited: float = 0.0  # seconds
    receipts: list[Callable[[], None]] = field(default_factory=list)  # what to count when it ends


class Delivery:
    """Fills batches from what the plan ordered. An interrupted call is undone by who made it."""

    def __init__(
        self,
        plan: Plan,
        dispatch: Dispatch,
        fleet: Fleet,
        recorder: Recorder,
        manifest: ManifestWriter | None,
        config: StreamConfig,
    ):
        self._plan = plan
        self._dispatch = dispatch
        self._fleet = fleet
        self._recorder = recorder
        self._manifest = manifest
        self._config = config
        self._current: Planned | None = None
        self._left = 0  # accepted images of batches that were opened, neither delivered yet nor dropped
        self._arrival = (np.zeros(0), np.zeros(0))  # of the current batch: ordered and accepted by class
        self._recent = self._new_recent()

    def take(self, n: int, waited: float = 0.0) -> SynthBatch:
        """n images, fewer only under `starved: real`. waited: seconds that the caller already waited for them."""
        n = int(n)
        began, queues = time.monotonic(), self._dispatch.queues()
        if self._recent is not None:
            self._recent.begin()
        call = _Call(SynthBatch.around(self._fleet.new_images(n)), waited=waited)
        self._fill(call)
        if self._current is not None and self._current.offset == self._dispatch.slot(self._current).count:
            self._consume(self._current)
        self._dispatch.issue()  # after the copy, so that a producer that wakes up does not compete with it
        if self._recent is not None:
            self._recent.keep()
        for receipt in call.receipts:
            receipt()
        self._left -= call.fresh
        self._recorder.took(n, began - waited, time.monotonic(), call.waited, queues)
        return call.out if call.filled == n else call.out[: call.filled]

    def plan_ahead(self) -> None:
        while self._plan.is_short:
            began_ns = time.monotonic_ns()
            batch = self._plan.add(self._recorder.steps)
            self._recorder.planned(len(batch.order), time.monotonic_ns() - began_ns)

    def _fill(self, call: _Call) -> None:
        while call.filled < len(call.out):
            batch = self._next_batch()
            if batch is not None:
                self._copy(batch, call)
            elif self._config.starved == "real":
                return
            elif self._recent is None or not self._serve_again(self._recent, call):
                self._fleet.check()
                began = time.monotonic()
                self._fleet.wait(NAP_SECONDS)
                call.waited += time.monotonic() - began

    def _next_batch(self) -> Planned | None:
        """The batch to deliver from, with images left in it; None when none is made."""
        while True:
            if self._current is None:
                self.plan_ahead()
                ready = self._dispatch.ready()
                if ready is None:
                    self._dispatch.issue()
                    ready = self._dispatch.ready()
                if ready is None:
                    return None
                self._open(ready)
            batch = self._current
            assert batch is not None
            if batch.offset < self._dispatch.slot(batch).count:
                return batch
            self._consume(batch)

    def _open(self, batch: Planned) -> None:
        """Begin to deliver from it: it is recorded before its first image leaves."""
        slot = self._dispatch.slot(batch)
        if batch.offset > slot.count:
            raise StreamaugError(
                f"batch {batch.order.k} was made again with {slot.count} accepted images, but {batch.offset} "
                "had been delivered before: model, judge or execution plan are not what they were"
            )
        if self._manifest is not None:
            self._manifest.opened(batch.order, slot, self._plan.judges)
        if batch is not self._plan.undelivered[0]:
            self._plan.undelivered.remove(batch)
            self._plan.undelivered.appendleft(batch)
        left = slot.count - batch.offset
        self._arrival = self._recorder.arrived(batch.order, slot)
        self._current, self._left = batch, self._left + left
        self._recorder.dropped(batch.offset)  # delivered before the run went on from a saved state

    def _consume(self, batch: Planned) -> None:
        """The current batch was delivered to its end: its slot is free."""
        self._plan.consumed(batch, *self._arrival)  # first: an interrupted call is known by what the plan lacks
        self._dispatch.free(batch)
        self._current = None
        if self._plan.empty_run >= self._config.max_empty:
            raise EverythingRejected(
                f"{self._plan.empty_run} batches in a row without one accepted image (stream.max_empty: "
                f"{self._config.max_empty}); accepted so far, by class:\n{self._recorder.summary()}"
            )

    def _copy(self, batch: Planned, call: _Call) -> None:
        began_ns = time.monotonic_ns()
        slot, begin, out = self._dispatch.slot(batch), call.filled, call.out
        m = min(len(out) - begin, slot.count - batch.offset)
        here, there = slice(begin, begin + m), slice(batch.offset, batch.offset + m)
        orders = batch.order.images[slot.source[there]]
        slot.copy_images(there, out.images[here])
        out.labels[here] = slot.labels[there]
        out.label_b[here] = orders["label_b"]
        out.label_mix[here] = orders["label_mix"]
        out.ids[here] = slot.ids[there]
        out.scores[here] = slot.scores[there]
        out.rows[here] = orders["row_a"]
        out.starts[here] = batch.order.start
        out.fresh[here] = True
        call.receipts.append(
            partial(
                self._recorder.delivered,
                out.labels[here],
                made_ns=slot.span_ns[1],
                planned_at=batch.planned_at,
                began_ns=began_ns,
                ended_ns=time.monotonic_ns(),
            )
        )
        if self._recent is not None:
            self._recent.add(out[here])
        batch.offset, call.filled, call.fresh = batch.offset + m, begin + m, call.fresh + m

    def _serve_again(self, recent: Recent, call: _Call) -> bool:
        begin = call.filled
        m = recent.serve(call.out, begin, len(call.out) - begin)
        call.receipts.append(partial(self._recorder.reused, call.out.labels[begin : begin + m]))
        call.filled += m
        return m > 0

    def drop_everything(self) -> None:
        """Forget what was planned and what was delivered lately. The plan is told by who calls this."""
        self._recorder.dropped(self._left)
        self._left = 0
        current, self._current = self._current, None
        self._dispatch.drop_everything(current)
        self._recent = self._new_recent()

    def _new_recent(self) -> Recent | None:
        if self._config.starved != "reuse":
            return None
        room = self._fleet.new_images(self._config.in_flight * self._config.batch_size)
        return Recent(room, self._config.max_reuse)

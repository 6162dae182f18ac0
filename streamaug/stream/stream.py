"""The trainer's end of the ring: plans orders, delivers images in their order, and can say exactly where it
is."""

import hashlib
import json
import logging
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from streamaug.config import Config, LoaderConfig, StreamConfig
from streamaug.errors import EverythingRejected, StreamaugError, UsageError
from streamaug.orders import OrderBatch, Planner, Weights
from streamaug.stream import arrays
from streamaug.stream.backends import Work
from streamaug.stream.batch import Recent, SynthBatch
from streamaug.stream.fleet import Fleet
from streamaug.stream.manifest import ManifestWriter
from streamaug.stream.position import Identity, Position
from streamaug.stream.ranks import own_rank
from streamaug.stream.ring import Layout, Slot
from streamaug.stream.stats import Recorder, StreamStats
from streamaug.stream.steering import Steering

if TYPE_CHECKING:
    from streamaug.preparation import Prepared

log = logging.getLogger("streamaug")

_NAP_SECONDS = 0.1  # what a lost wake-up costs at most


@dataclass(eq=False)
class _Batch:
    """An order that was planned and whose images were not all delivered yet."""

    order: OrderBatch
    ring: int = -1
    number: int = -1  # its number in that ring, -1 until it is written there
    offset: int = 0  # accepted images delivered so far
    planned_at: int = 0  # calls of take there had been

    @property
    def name(self) -> tuple[int, int, int]:
        return self.order.k, self.order.plan_version, self.order.judge_version


class Stream:
    """An endless, reproducible stream of synthetic images, made by producers while the caller trains.

    `take` is called from one thread at a time. Producers start at the first `take` (or at `start`) and end
    with `close`, with the stream's garbage collection, or with the process, however it ends.
    """

    def __init__(
        self,
        planner: Planner,
        *,
        engine: str,
        engine_options: dict[str, Any],
        image_shape: tuple[int, int, int],
        config: StreamConfig,
        judge_state: np.ndarray | None = None,
        class_names: Sequence[str] | None = None,
        device: str = "cpu",
        loader_config: LoaderConfig | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        plan_extra: Mapping[str, Any] | None = None,
    ):
        """engine: "module:function", called in the producer with `engine_options` (JSON) and returning an
        `Engine`. image_shape: (C, H, W). judge_state: uint8 [n], version 0 of a judge that can be published
        anew; None when the engine's judge is its own affair. device: where the engine runs ("cpu", "cuda",
        "auto"), for backend auto. plan_extra: what images depend on besides the planner (digests of model,
        bank, judge), JSON. Rank r of `world_size` makes the batches k = r modulo world_size; by default they are those
        of torch's default process group, if there is one.

        Raises MemoryTooSmall when the ring cannot fit, UsageError when the arguments contradict each other.
        """
        if planner.batch_size != config.batch_size:
            raise UsageError(
                f"the planner plans batches of {planner.batch_size}, stream.batch_size is {config.batch_size}"
            )
        rank, world_size = own_rank(rank, world_size)
        self.planner = planner
        self.config = config
        self.image_shape = image_shape
        self.class_names = list(class_names or map(str, range(planner.num_classes)))
        self.loader_config = loader_config
        self.rank = rank
        self.world_size = world_size
        self._weights: dict[int, Weights] = {}
        self._weights_version = -1
        self._reset_plan(None, None)
        self._next_k = rank
        self._first_judge = None if judge_state is None else arrays.judge_bytes(judge_state, None)
        self._judges: dict[int, np.ndarray] = {} if self._first_judge is None else {0: self._first_judge}
        self._judge_version = 0
        self._posts: dict[int, int] = {}  # judge version -> its post in the mailboxes
        self._last_post = -1
        self._identity = Identity(
            plan=_plan_hash(planner, image_shape, plan_extra),
            batch_size=config.batch_size,
            in_flight=config.in_flight,
            rank=rank,
            world_size=world_size,
            threads=config.threads,
            first_judge=_digest(self._first_judge),
            judge_nbytes=0 if self._first_judge is None else len(self._first_judge),
        )

        self._pending: deque[_Batch] = deque()
        self._current: _Batch | None = None
        self._empty_run = 0
        self._before: Position | None = None  # where the call of take began that is in progress, or was interrupted
        self._arrival = (np.zeros(0), np.zeros(0))  # of the current batch: ordered and accepted by class
        self._filled = 0  # of the call of take in progress: images copied, seconds waited, what to count at its end
        self._waited = 0.0
        self._receipts: list[Callable[[], None]] = []
        self._turn = 0
        self._released = [0] * config.producers  # by ring: batches whose slot is free again
        self._drop_to = [0] * config.producers  # by ring: batches below are discarded when they arrive

        try:
            json.dumps(engine_options)
        except TypeError as error:
            raise UsageError(f"engine_options must be JSON: {error}") from None
        slots = -(-config.in_flight // config.producers)
        layout = Layout(planner.batch_size, self.image_shape, slots)
        environment = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
        work = Work(engine, engine_options, planner.seed, config.threads, config.nice, environment)
        self._fleet = Fleet(config, _backend(config, device), layout, self._identity.judge_nbytes, work)
        self._manifest = self._open_manifest(engine, engine_options, plan_extra, device)
        self._recorder = Recorder(self.class_names, config.producers)
        self._recent = self._new_recent()
        self._started = False
        self._announced = False
        self._taking = threading.RLock()
        self._owner = os.getpid()
        self._finalizer = weakref.finalize(self, Fleet.close, self._fleet)

    @classmethod
    def from_config(
        cls,
        config: str | os.PathLike | Config,
        overrides: Sequence[str] = (),
        *,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> "Stream":
        """The stream that a configuration describes: a YAML file, a bundled name ("digits") or a `Config`.

        `overrides` are "a.b=value" strings. Prepares what is missing (prior, bank, judge) before it returns; of several
        ranks or processes that want the same, one does it and the others wait.
        """
        from streamaug.config import load
        from streamaug.preparation import prepare_in_turn

        resolved = config if isinstance(config, Config) else load(config, overrides)
        return cls.from_prepared(prepare_in_turn(resolved), rank=rank, world_size=world_size)

    @classmethod
    def from_prepared(cls, prepared: "Prepared", *, rank: int | None = None, world_size: int | None = None) -> "Stream":
        """The stream of what `prepare` made."""
        return cls(
            prepared.planner,
            engine=prepared.engine,
            engine_options=prepared.engine_options,
            image_shape=prepared.image_shape,
            config=prepared.config.stream,
            judge_state=prepared.judge_state,
            class_names=prepared.class_names,
            loader_config=prepared.config.loader,
            device=prepared.config.model.device,
            rank=rank,
            world_size=world_size,
            plan_extra=prepared.plan_extra,
        )

    # Taking images.

    def start(self) -> None:
        """Allocate the ring and start the producers, without waiting for them. `take` does it when needed."""
        self._require_usable()
        if not self._started:
            self._recorder.started()
            self._fleet.start()
            self._started = True

    def take(self, n: int) -> SynthBatch:
        """The next n images, copied. Fewer only under `starved: real`, when no more are ready.

        Raises ProducerError (the producer's exception with its traceback, or its last words), a UsageError
        that the engine raised, EverythingRejected after `max_empty` batches without an accepted image. An
        interrupted call loses nothing: the next one delivers the same images.
        """
        self.start()
        with self._taking:
            self._fleet.check()
            self._undo_interrupted()
            self._plan_ahead()
            self._before = self._position()
            out = SynthBatch.empty(n, self.image_shape)
            self._filled = 0
            self._waited = 0.0
            self._receipts.clear()
            fill = self._fill_of_queues()
            self._fill(out)
            if self._current is not None and self._current.offset == self._slot(self._current).count:
                self._consume(self._current)
            self._issue()  # after the copy, so that a producer that wakes up does not compete with it
            self._count(fill)
            self._before = None
            return out if self._filled == n else out[: self._filled]

    def _undo_interrupted(self) -> None:
        """What an interrupted call of take had copied was not delivered: go back to where it began."""
        if self._before is None:
            return
        undelivered = self._undelivered()
        if [batch.name for batch in undelivered] == self._before.undelivered:
            undelivered[0].offset = self._before.offset
        else:
            self._go_to(self._before)
        self._before = None

    def _count(self, fill: tuple[float, float]) -> None:
        for receipt in self._receipts:
            receipt()
        self._recorder.took(self._waited, *fill)
        if self._recorder.report_due():
            log.info("%s", self._stats(timeline=False).line())

    def _fill(self, out: SynthBatch) -> None:
        while self._filled < len(out):
            batch = self._next_batch()
            if batch is not None:
                self._copy(batch, out)
            elif self.config.starved == "real":
                return
            elif self._recent is None or not self._serve_again(out):
                self._fleet.check()
                began = time.monotonic()
                self._fleet.wait(_NAP_SECONDS)
                self._waited += time.monotonic() - began

    def _next_batch(self) -> _Batch | None:
        """The batch to deliver from, with images left in it; None when none is ready."""
        while True:
            batch = self._current
            if batch is None:
                self._plan_ahead()
                batch = self._open_ready()
            if batch is None:
                self._issue()
                batch = self._open_ready()
            if batch is None:
                return None
            if batch.offset < self._slot(batch).count:
                return batch
            self._consume(batch)

    def _copy(self, batch: _Batch, out: SynthBatch) -> None:
        began_ns = time.monotonic_ns()
        slot, begin = self._slot(batch), self._filled
        m = min(len(out) - begin, slot.count - batch.offset)
        here, there = slice(begin, begin + m), slice(batch.offset, batch.offset + m)
        orders = batch.order.images[slot.source[there]]
        out.images[here] = slot.images[there]
        out.labels[here] = slot.labels[there]
        out.label_b[here] = orders["label_b"]
        out.label_mix[here] = orders["label_mix"]
        out.ids[here] = slot.ids[there]
        out.scores[here] = slot.scores[there]
        out.rows[here] = orders["row_a"]
        out.starts[here] = batch.order.start
        out.fresh[here] = True
        self._receipts.append(
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
        batch.offset, self._filled = batch.offset + m, begin + m

    def _serve_again(self, out: SynthBatch) -> bool:
        assert self._recent is not None
        begin = self._filled
        m = self._recent.serve(out, begin, len(out) - begin)
        self._receipts.append(partial(self._recorder.reused, out.labels[begin : begin + m]))
        self._filled += m
        return m > 0

    # Planning: always `in_flight` orders ahead. Batch k is fixed by what was known when the batch `in_flight`
    # places # before it had been delivered to its end.

    def _plan_ahead(self) -> None:
        while len(self._pending) + (self._current is not None) < self.config.in_flight:
            began_ns = time.monotonic_ns()
            weights = self._latest_weights()
            order = self.planner.batch(self._next_k, weights, self._judge_version)
            self._pending.append(_Batch(order, planned_at=self._recorder.steps))
            self._recorder.planned(len(order), time.monotonic_ns() - began_ns)
            self._next_k += self.world_size
            self._forget_unnamed()

    def _latest_weights(self) -> Weights:
        classes = self._steering.classes()
        if not np.array_equal(classes, self._weights[self._weights_version].classes):
            self._weights_version += 1
            self._weights[self._weights_version] = Weights(self._weights_version, classes, self._row_weights)
        return self._weights[self._weights_version]

    def _forget_unnamed(self) -> None:
        """Keep the versions that undelivered orders name, and the latest ones."""
        orders = [batch.order for batch in self._undelivered()]
        plans = {self._weights_version, *(order.plan_version for order in orders)}
        judges = {self._judge_version, *(order.judge_version for order in orders)}
        self._weights = {version: kept for version, kept in self._weights.items() if version in plans}
        self._judges = {version: kept for version, kept in self._judges.items() if version in judges}
        self._posts = {version: kept for version, kept in self._posts.items() if version in judges}

    def _undelivered(self) -> list[_Batch]:
        return ([] if self._current is None else [self._current]) + list(self._pending)

    def _issue(self) -> None:
        """Write planned orders into the rings, as far as there are free slots."""
        self._discard_arrivals()
        rings = self._fleet.rings
        for batch in self._pending:
            if batch.number >= 0:
                continue
            taken = [ring.issued - released for ring, released in zip(rings, self._released, strict=True)]
            at = self._turn % len(rings) if self.config.in_order else int(np.argmin(taken))
            if taken[at] == self._fleet.layout.slots:
                return
            number = self._fleet.issue(at, batch.order, self._post(batch.order.judge_version))
            batch.ring, batch.number = at, number
            self._turn += 1

    def _post(self, version: int) -> int:
        """Where producers find that version of the judge; puts it there first when it is not there yet."""
        if self._fleet.mailboxes is None:
            return 0
        if version not in self._posts:
            self._last_post += 1
            self._fleet.mailboxes.write(self._last_post, self._judges[version], keep=set(self._posts.values()))
            self._posts[version] = self._last_post
        return self._posts[version]

    def _discard_arrivals(self) -> None:
        """Free the slots of batches that a redirection made useless, once they are published."""
        for at, ring in enumerate(self._fleet.rings):
            while self._released[at] < min(self._drop_to[at], ring.published):
                slot = ring.slot(self._released[at])
                self._recorder.arrived(slot.order, slot)
                self._recorder.dropped(slot.count)
                self._released[at] += 1

    def _open_ready(self) -> _Batch | None:
        """Make the next batch in order (or the first that is ready) the current one, when it is published."""
        rings = self._fleet.rings
        candidates = list(self._pending)[: 1 if self.config.in_order else None]
        ready = (one for one in candidates if 0 <= one.number < rings[one.ring].published)
        batch = next(ready, None)
        if batch is None:
            return None
        slot = self._slot(batch)
        if self._manifest is not None:
            self._manifest.opened(batch.order, slot, self._judges)
        self._pending.remove(batch)
        self._current = batch
        self._arrival = self._recorder.arrived(batch.order, slot)
        if batch.offset > slot.count:
            raise StreamaugError(
                f"batch {batch.order.k} was made again with {slot.count} accepted images, but {batch.offset} "
                "had been delivered before: model, judge or execution plan are not what they were"
            )
        self._announce()
        return batch

    def _consume(self, batch: _Batch) -> None:
        """The current batch was delivered to its end: its slot is free."""
        empty = self._slot(batch).count == 0
        self._current = None
        self._released[batch.ring] = batch.number + 1
        self._steering.consumed(*self._arrival)
        self._empty_run = self._empty_run + 1 if empty else 0
        if self._empty_run >= self.config.max_empty:
            raise EverythingRejected(
                f"{self._empty_run} batches in a row without one accepted image (stream.max_empty: "
                f"{self.config.max_empty}); accepted so far, by class:\n{self._recorder.summary()}"
            )

    def _slot(self, batch: _Batch) -> Slot:
        return self._fleet.rings[batch.ring].slot(batch.number)

    # What changes while it runs.

    def feedback(self, labels: Any, losses: Any, ids: Any = None) -> None:
        """Tell the stream how the classifier does: classes with higher losses are ordered more, in bounds.

        labels: int [n]; losses: float [n], one per image, not finite ones are left out; ids: int [n], the ids
        of synthetic images and -1 for real ones, for policies that weigh single rows. Arrays or tensors. It
        changes the batches that are planned from now on, in_flight batches ahead.
        """
        self._require_usable()
        self._undo_interrupted()
        self._steering.observe(*arrays.feedback(labels, losses, ids, self.planner.num_classes))

    def publish_judge(self, state: np.ndarray) -> int:
        """Publish a new state of the live judge (uint8, as long as the first); returns its version.

        Batches planned from now on are judged with it, in_flight batches ahead; those in flight are not.
        """
        self._require_usable()
        if self._first_judge is None:
            raise UsageError("this stream has no live judge: it was made without a judge_state")
        self._undo_interrupted()
        self._judge_version += 1
        self._judges[self._judge_version] = arrays.judge_bytes(state, self._identity.judge_nbytes)
        return self._judge_version

    def replan(
        self,
        *,
        row_weights: np.ndarray | None = None,
        class_weights: np.ndarray | None = None,
        judge_state: np.ndarray | None = None,
        first_k: int | None = None,
    ) -> None:
        """Switch to another plan at once: batches in flight are dropped, feedback and acceptance start anew.

        row_weights: float64 [R]; class_weights: float64 [C], what delivered classes should follow; None is
        uniform. judge_state: as in `publish_judge`; None keeps the judge. first_k: the batch to go on with
        (this rank's first one from there); None goes on after the last one planned.
        """
        self._require_usable()
        classes = arrays.weights("class_weights", class_weights, self.planner.num_classes)
        rows = arrays.weights("row_weights", row_weights, len(self.planner.row_labels))
        self._undo_interrupted()
        if judge_state is not None:
            self.publish_judge(judge_state)
        if self._manifest is not None:
            self._manifest.mark(self._position())
        self._drop_everything()
        self._reset_plan(classes, rows)
        if first_k is not None:
            self._next_k = int(first_k) + (self.rank - int(first_k)) % self.world_size
        self._empty_run = 0

    def _reset_plan(self, classes: np.ndarray | None, rows: np.ndarray | None) -> None:
        self._steering = Steering(np.ones(self.planner.num_classes) if classes is None else classes)
        self._row_weights = rows
        self._weights_version += 1
        self._weights = {self._weights_version: Weights(self._weights_version, self._steering.classes(), rows)}

    def _drop_everything(self) -> None:
        """Forget what was planned: batches in flight are passed over, or discarded when they arrive."""
        if self._current is not None:
            self._recorder.dropped(self._slot(self._current).count - self._current.offset)
            self._released[self._current.ring] = self._current.number + 1
        for at, ring in enumerate(self._fleet.rings):
            self._drop_to[at] = ring.issued
            self._fleet.skip_to(at, ring.issued)
        self._current = None
        self._pending.clear()
        self._posts.clear()
        self._recent = self._new_recent()

    def _new_recent(self) -> Recent | None:
        if self.config.starved != "reuse":
            return None
        capacity = self.config.in_flight * self.config.batch_size
        return Recent(capacity, self.image_shape, self.config.max_reuse)

    # Where it is.

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on with the very next image: plain numbers, strings, lists and dicts;
        states of a live judge, if any was published, as uint8 tensors under "tensors"."""
        return self._position().state_dict(self._identity)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was called, with any number of producers.

        Raises StateError when the state belongs to another plan, batch size, in_flight, rank or judge.
        """
        self._require_usable()
        self._go_to(Position.from_state(state, self._identity))
        self._before = None

    def _go_to(self, position: Position) -> None:
        if self._manifest is not None:
            self._manifest.resumed(position)
        self._drop_everything()
        self._weights = position.weights
        self._weights_version = position.latest_weights
        self._row_weights = position.row_weights
        self._judges = position.judges | {0: self._first_judge} if self._first_judge is not None else {}
        self._judge_version = position.latest_judge
        self._steering = position.steering
        self._next_k = position.next_k
        self._empty_run = position.empty_run
        for k, plan_version, judge_version in position.undelivered:
            order = self.planner.batch(k, self._weights[plan_version], judge_version)
            self._pending.append(_Batch(order, planned_at=self._recorder.steps))
        if self._pending:
            self._pending[0].offset = position.offset

    def _position(self) -> Position:
        if self._before is not None:
            return self._before
        batches = self._undelivered()
        return Position(
            undelivered=[batch.name for batch in batches],
            offset=batches[0].offset if batches else 0,
            next_k=self._next_k,
            empty_run=self._empty_run,
            weights=dict(self._weights),
            latest_weights=self._weights_version,
            judges=dict(self._judges),
            latest_judge=self._judge_version,
            row_weights=self._row_weights,
            steering=self._steering.copy(),
        )

    # How it goes.

    @property
    def started_at(self) -> float | None:
        """When it was started, on time.monotonic's clock: where the seconds of `StreamStats.timeline`
        begin."""
        return None if self._recorder.started_ns is None else self._recorder.started_ns / 1e9

    @property
    def producer_pids(self) -> list[int]:
        """Process ids of the running producers; empty before the start and with backend local."""
        return self._fleet.pids

    @property
    def ring_nbytes(self) -> int:
        """Shared memory that the ring takes."""
        return self._fleet.nbytes

    @property
    def rate(self) -> float | None:
        """Images per second that pass the judge when producers never wait; None before the first batch."""
        rate = self._recorder.rate()
        return None if rate is None else rate * self._recorder.acceptance

    def sustainable(self, ratio: float) -> float | None:
        """Training images a second that producers can feed at this synthetic share; None when unknown."""
        return None if self.rate is None or ratio <= 0 else self.rate / ratio

    def stats(self) -> StreamStats:
        return self._stats(timeline=True)

    def _stats(self, *, timeline: bool) -> StreamStats:
        _, ring_fill = self._fill_of_queues()
        return self._recorder.stats(ring_fill, self._fleet.restarts, timeline=timeline)

    def _fill_of_queues(self) -> tuple[float, float]:
        """Shares of the orders in flight: not yet made, and made but not yet taken."""
        waiting = ready = 0
        for ring, released in zip(self._fleet.rings, self._released, strict=False):
            published, issued = ring.published, ring.issued
            waiting += issued - min(published, issued)
            ready += min(published, issued) - released
        return min(waiting / self.config.in_flight, 1.0), min(ready / self.config.in_flight, 1.0)

    def _announce(self) -> None:
        if self._announced or self._recorder.batches <= self.config.producers:
            return
        self._announced = True
        ratio = self.loader_config.ratio if self.loader_config is not None else 0.5
        log.info(
            "producer ready in %.1f s; %.0f images/s: at ratio %g it feeds up to %.0f training images/s",
            (self._fleet.ready_ns - (self._recorder.started_ns or 0)) / 1e9,
            self.rate or 0,
            ratio,
            self.sustainable(ratio) or 0,
        )

    def _open_manifest(
        self, engine: str, options: dict[str, Any], extra: Mapping[str, Any] | None, device: str
    ) -> ManifestWriter | None:
        if self.config.manifest is None:
            return None
        threads = self.config.threads
        if self._fleet.backend == "local" and "torch" in sys.modules:
            threads = sys.modules["torch"].get_num_threads()  # of this process, in which the engine runs
        return ManifestWriter(
            self.config.manifest,
            self._identity,
            engine=engine,
            engine_options=options,
            image_shape=self.image_shape,
            class_names=self.class_names,
            plan_extra=extra,
            device=device,
            threads=threads,
        )

    # The end.

    def close(self) -> None:
        """End the producers and give the memory back. May be called twice; does nothing in a forked child."""
        if os.getpid() != self._owner:
            return
        self._fleet.stop()
        with self._taking:
            self._fleet.release()
            if self._manifest is not None:
                self._manifest.close(self._position())
        self._finalizer.detach()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _require_usable(self) -> None:
        if os.getpid() != self._owner:
            raise StreamaugError(
                f"this stream belongs to process {self._owner}; a forked child, such as a DataLoader worker, "
                "cannot use it"
            )
        if self._fleet.closed:
            raise StreamaugError("the stream was closed")


def _backend(config: StreamConfig, device: str) -> str:
    """`auto` is local where trainer and producer share one GPU, else process."""
    if config.backend != "auto":
        return config.backend
    if device == "cpu":
        return "process"
    import torch

    return "local" if torch.cuda.device_count() == 1 else "process"


def _plan_hash(planner: Planner, image_shape: Sequence[int], extra: Mapping[str, Any] | None) -> str:
    text = json.dumps([planner.digest(), list(image_shape), dict(extra or {})], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _digest(state: np.ndarray | None) -> str | None:
    return None if state is None else hashlib.sha256(state.tobytes()).hexdigest()[:16]

"""The trainer's end of the ring: an endless stream of synthetic images that can say exactly where it is."""

import hashlib
import json
import logging
import os
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from streamaug.config import Config, LoaderConfig, Overrides, StreamConfig
from streamaug.errors import StreamaugError, UsageError
from streamaug.orders import Planner
from streamaug.stream import arrays
from streamaug.stream.batch import SynthBatch
from streamaug.stream.delivery import Delivery
from streamaug.stream.dispatch import Dispatch
from streamaug.stream.manifest import ManifestWriter
from streamaug.stream.plan import Plan
from streamaug.stream.position import Identity, Position
from streamaug.stream.producers.backends import Work
from streamaug.stream.producers.fleet import Fleet
from streamaug.stream.ranks import Meeting, own_rank, trainers_here
from streamaug.stream.rates.recorder import Recorder
from streamaug.stream.rates.reporter import Reporter
from streamaug.stream.rates.stats import StreamStats
from streamaug.stream.ring import Layout

if TYPE_CHECKING:
    from streamaug.preparation import Prepared

log = logging.getLogger("streamaug")


class Stream:
    """An endless, reproducible stream of synthetic images, made by producers while the caller trains.

    `take` is called from one thread at a time; what changes or tells the state waits until it has returned. A signal
    handler that interrupts it may ask for the state, which is that before the call, and close the stream, after which
    the call raises unless it was as good as done. Producers start at the first `take` (or at `start`) and end with
    `close`, with the stream's garbage collection, or with the process, however it ends.
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
        of torch's default process group, if there is one. With `config.shared`, its ranks on one machine share the
        producers: the one whose `start` comes first keeps them, and every n-th stream of a plan meets the others' n-th.

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
        # The synthetic share that the loop asks for, where it is one number: a loader that has its own says it here.
        ratio: Any = None if loader_config is None else loader_config.ratio
        self.asked_ratio: float | None = ratio if isinstance(ratio, float) else None
        first_judge = None if judge_state is None else arrays.judge_bytes(judge_state, None)
        self._identity = Identity(
            plan=_plan_hash(planner, image_shape, plan_extra),
            batch_size=config.batch_size,
            in_flight=config.in_flight,
            rank=rank,
            world_size=world_size,
            threads=config.threads,
            first_judge=_digest(first_judge),
            judge_nbytes=0 if first_judge is None else len(first_judge),
        )
        self._plan = Plan(planner, config.in_flight, rank=rank, world_size=world_size, first_judge=first_judge)
        self._before: Position | None = None  # where the call of take began that is in progress, or was interrupted
        try:
            json.dumps(engine_options)
        except TypeError as error:
            raise UsageError(f"engine_options must be JSON: {error}") from None
        slots = -(-config.in_flight // config.producers)
        if config.deliver_on != "cpu":
            slots += 1  # an order need not wait until the GPU has copied the last take's images
        layout = Layout(planner.batch_size, self.image_shape, slots)
        environment = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
        work = Work(engine, engine_options, planner.seed, config.threads, config.nice, environment, device)
        shared = config.shared and world_size > 1
        self._fleet = Fleet(
            config,
            "process" if shared else _backend(config, device),
            layout,
            self._identity.judge_nbytes,
            work,
            trainer_device=config.deliver_on,
            meeting=Meeting(self._identity.plan, rank) if shared else None,
        )
        self._manifest = self._open_manifest(engine, engine_options, plan_extra, device)
        self._recorder = Recorder(self.class_names, config.producers, self._fleet.sharers)
        self._dispatch = Dispatch(self._fleet, self._plan, self._recorder, config)
        self._delivery = Delivery(self._plan, self._dispatch, self._fleet, self._recorder, self._manifest, config)
        self._reporter = Reporter(self._fleet, self._plan, self._dispatch, self._recorder, trainers_here(world_size))
        self._started = False
        self._taking = threading.RLock()
        self._in_take = threading.Lock()  # held by the thread that has the other one
        self._closed_in_take = False
        self._owner = os.getpid()
        self._finalizer = weakref.finalize(self, Fleet.close, self._fleet)

    @classmethod
    def from_config(
        cls,
        config: str | os.PathLike | Config,
        overrides: Overrides = (),
        *,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> "Stream":
        """The stream that a configuration describes: a YAML file, a bundled name ("digits") or a `Config`.

        `overrides` are "a.b=value" strings, or a mapping of such keys to values. Prepares what is missing (prior, bank,
        judge) before it returns; of several ranks or processes that want the same, one does it and the others wait.
        Global random states (torch, NumPy, random) are afterwards what they were.
        """
        from streamaug.config import load
        from streamaug.engine import resolve_device
        from streamaug.preparation import prepare_in_turn, random_state_kept

        resolved = config if isinstance(config, Config) else load(config, overrides)
        with random_state_kept(resolve_device(resolved.model.device)):
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
        with self._taking:
            self._require_no_take()
            self._start()

    def _start(self) -> None:
        self._require_usable()
        if not self._started:
            self._recorder.started()
            self._fleet.start()
            self._started = True

    def take(self, n: int) -> SynthBatch:
        """The next n images, copied. Fewer only under `starved: real`, when no more are ready.

        Raises ProducerError (the producer's exception with its traceback, or its last words), a UsageError
        that the engine raised or n is no number of images, EverythingRejected after `max_empty` batches without an
        accepted image. An interrupted call loses nothing: the next one delivers the same images.
        """
        if not isinstance(n, Integral) or n < 0:
            raise UsageError(f"take(n): n is a number of images from 0, got {n!r}")
        self._require_usable()
        with self._taking:
            self._require_no_take()
            try:
                with self._in_take:
                    return self._take(n)
            finally:
                if self._closed_in_take:
                    self.close()

    def _take(self, n: int) -> SynthBatch:
        self._start()
        self._fleet.check()
        self._undo_interrupted(nothing_said=True)
        self._before = self._plan.position()
        self._delivery.plan_ahead()
        waited = self._reporter.before_first(self.asked_ratio) if n else 0.0
        batch = self._delivery.take(n, waited)
        self._reporter.after(self.asked_ratio)
        self._before = None
        return batch

    def _require_no_take(self) -> None:
        """Another thread's has ended by the time `_taking` is had, and with it the stream may have."""
        self._require_usable()
        if self._in_take.locked():
            raise UsageError(
                "a signal handler that interrupts take may call state_dict and close; the rest is for when take has "
                "returned: let the handler set a flag that the loop looks at"
            )

    def _undo_interrupted(self, *, nothing_said: bool = False) -> None:
        """What an interrupted call of take had copied was not delivered: go back to where it began.

        nothing_said: since then, which makes the orders that it planned those that the next call would plan.
        """
        if self._before is None:
            return
        undelivered = self._plan.undelivered
        kept = len(undelivered) if nothing_said else len(self._before.undelivered)
        if self._plan.continues(self._before) and len(undelivered) == kept:
            planned_since = [0] * (len(undelivered) - len(self._before.offsets))
            for batch, offset in zip(undelivered, self._before.offsets + planned_since, strict=True):
                batch.offset = offset
        else:
            self._go_to(self._before)
        self._before = None

    # What changes while it runs.

    def feedback(self, labels: Any, losses: Any, ids: Any = None) -> None:
        """Tell the stream how the classifier does: classes with higher losses are ordered more, in bounds.

        labels: int [n]; losses: float [n], one per image, real or synthetic; not finite ones are left out. Arrays or
        tensors. Each class keeps a running mean of its losses (a call counts for a tenth of it), and its share of the
        orders follows that mean, within half and twice its target; a class without a loss so far keeps its share.
        ids: int [n], the ids of synthetic images and -1 for real ones. Today they are checked for their length and
        change nothing: they are there for policies that weigh single bank rows.

        It changes the batches that are planned from now on, `in_flight` batches ahead, and is part of the state.
        Raises UsageError for lengths that differ, DataError for a class that is none.
        """
        self._require_usable()
        with self._taking:
            self._require_no_take()
            self._undo_interrupted()
            self._plan.feedback(labels, losses, ids)

    def publish_judge(self, state: np.ndarray) -> int:
        """Publish a new state of the live judge (uint8, as long as the first); returns its version.

        Batches planned from now on are judged with it, `in_flight` batches ahead; those in flight are not.
        """
        self._require_usable()
        with self._taking:
            self._require_no_take()
            self._undo_interrupted()
            return self._plan.publish_judge(state)

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
        with self._taking:
            self._require_no_take()
            self._undo_interrupted()
            if judge_state is not None:
                self.publish_judge(judge_state)
            if self._manifest is not None:
                self._manifest.mark(self._plan.position())
            self._delivery.drop_everything()
            self._plan.switch(classes, rows, first_k)

    # Where it is.

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on with the very next image: plain numbers, strings, lists and dicts;
        states of a live judge, if any was published, as uint8 tensors under "tensors"."""
        if not self._taking.acquire(blocking=os.getpid() == self._owner):
            raise StreamaugError(
                "this process was forked while another thread was in take: ask for the state before the fork"
            )
        try:
            return self._position().state_dict(self._identity)
        finally:
            self._taking.release()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was called, with any number of producers.

        Raises StateError when the state belongs to another plan, batch size, in_flight, rank or judge.
        """
        self._require_usable()
        position = Position.from_state(state, self._identity)
        with self._taking:
            self._require_no_take()
            self._go_to(position)
            self._before = None

    def _go_to(self, position: Position) -> None:
        if self._manifest is not None:
            self._manifest.resumed(position)
        self._delivery.drop_everything()
        self._plan.go_to(position, self._recorder.steps)

    def _position(self) -> Position:
        return self._plan.position() if self._before is None else self._before

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
    def producers_on_gpu(self) -> bool:
        """Whether any producer runs its model on a GPU."""
        return self._fleet.placement.sides.producer_on_gpu

    @property
    def ring_nbytes(self) -> int:
        """Shared memory that the ring takes."""
        return self._fleet.nbytes

    @property
    def rate(self) -> float | None:
        """Images per second that pass the judge when producers never wait; None before the first batch. Of producers
        that ranks share, this rank's part."""
        return self._recorder.rate()

    def sustainable(self, ratio: float) -> float | None:
        """Training images a second that producers can feed at this synthetic share; None when unknown."""
        return None if self.rate is None or ratio <= 0 else self.rate / ratio

    def stats(self) -> StreamStats:
        return self._reporter.stats(self.asked_ratio)

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
            self._closed_in_take = self._in_take.locked()  # by a signal handler: take still looks into the memory
            if self._closed_in_take:
                return
            self._fleet.stop()  # what a call of take had not got to start by then
            self._fleet.release()
            if self._manifest is not None:
                self._manifest.close(self._position())
            self._finalizer.detach()

    def __reduce__(self) -> NoReturn:
        raise StreamaugError(
            "a stream cannot be copied or pickled, its producers and memory belong to this process: make it where it "
            "is used, and keep `state_dict()` to go on elsewhere"
        )

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.image_shape))
        how = "closed" if self._fleet.closed else "running" if self._started else "not started"
        return (
            f"<Stream of {len(self.class_names)} classes, images {shape}, rank {self.rank} of {self.world_size}: {how}>"
        )

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
            raise StreamaugError("the stream was closed; build a new one, and load_state_dict(...) its state to go on")


def _backend(config: StreamConfig, device: str) -> str:
    """`auto` is local where trainer and producer share one GPU, else process."""
    if config.backend != "auto":
        return config.backend
    if device == "cpu" or config.devices:
        return "process"
    import torch

    return "local" if torch.cuda.device_count() == 1 else "process"


def _plan_hash(planner: Planner, image_shape: Sequence[int], extra: Mapping[str, Any] | None) -> str:
    text = json.dumps([planner.digest(), list(image_shape), dict(extra or {})], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _digest(state: np.ndarray | None) -> str | None:
    return None if state is None else hashlib.sha256(state.tobytes()).hexdigest()[:16]

"""The trainer's end of the ring: plans orders, delivers images in their order, and can say exactly where it is."""

import hashlib
import json
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from streamaug.config import Config, LoaderConfig, StreamConfig
from streamaug.errors import DataError, EverythingRejected, StateError, StreamaugError, UsageError
from streamaug.orders import OrderBatch, Planner, Weights
from streamaug.stream.backends import Work
from streamaug.stream.batch import Recent, SynthBatch
from streamaug.stream.fleet import Fleet
from streamaug.stream.ring import Layout
from streamaug.stream.stats import DEFAULT_REASONS, Recorder, StreamStats
from streamaug.stream.steering import Steering

log = logging.getLogger("streamaug")

_STATE_FORMAT = 1
_NAP_SECONDS = 0.1  # what a lost wake-up costs at most


@dataclass
class _Batch:
    """An order that was planned and whose images were not all delivered yet."""

    order: OrderBatch
    ring: int = -1
    number: int = -1  # its number in that ring, -1 until it is written there
    offset: int = 0  # accepted images delivered so far

    @property
    def name(self) -> tuple[int, int, int]:
        return self.order.k, self.order.plan_version, self.order.judge_version


@dataclass(frozen=True)
class _Position:
    """Where the stream is between two calls of `take`: all that decides what comes next."""

    undelivered: list[tuple[int, int, int]]  # (k, plan version, judge version), in the order of delivery
    offset: int  # accepted images of the first one that were delivered
    skip: int  # images after that which were delivered as well
    next_k: int
    empty_run: int
    weights: dict[int, Weights]  # the versions that undelivered orders name, and the latest
    latest_weights: int
    judges: dict[int, np.ndarray]
    latest_judge: int
    row_weights: np.ndarray | None
    steering: dict[str, Any]


class Stream:
    """An endless, reproducible stream of synthetic images, made by producers while the caller trains.

    `take` is called from one thread at a time. Producers start at the first `take` (or at `start`) and end with
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
        reasons: Sequence[str] = DEFAULT_REASONS,
        loader_config: LoaderConfig | None = None,
        rank: int = 0,
        world_size: int = 1,
        plan_extra: Mapping[str, Any] | None = None,
    ):
        """engine: "module:function", called in the producer with `engine_options` (JSON) and returning an `Engine`.
        image_shape: (C, H, W). judge_state: uint8 [n], version 0 of a judge that can be published anew; None when
        the engine's judge is its own affair. reasons: names of the codes in Slot.reasons. plan_extra: what images
        depend on besides the planner (digests of model, bank, judge), JSON. Rank r of `world_size` makes the
        batches k = r modulo world_size.

        Raises MemoryTooSmall when the ring cannot fit, UsageError when the arguments contradict each other.
        """
        if planner.batch_size != config.batch_size:
            raise UsageError(
                f"the planner plans batches of {planner.batch_size}, stream.batch_size is {config.batch_size}"
            )
        if not 0 <= rank < world_size:
            raise UsageError(f"rank {rank} of world_size {world_size}: ranks count from 0 to world_size - 1")
        self.planner = planner
        self.config = config
        self.image_shape = tuple(image_shape)
        self.class_names = list(class_names or map(str, range(planner.num_classes)))
        self.loader_config = loader_config
        self.rank = rank
        self.world_size = world_size
        self._plan = _plan_hash(planner, image_shape, plan_extra)
        self._reset_plan(np.ones(planner.num_classes), None)
        self._next_k = rank
        self._judges: dict[int, np.ndarray] = {}
        self._judge_nbytes = 0
        if judge_state is not None:
            self._judges[0] = _judge_bytes(judge_state, None)
            self._judge_nbytes = len(self._judges[0])
        self._first_judge_digest = _digest(self._judges.get(0))
        self._judge_version = 0
        self._posts: dict[int, int] = {}  # judge version -> its post in the mailboxes
        self._last_post = -1

        self._pending: deque[_Batch] = deque()
        self._current: _Batch | None = None
        self._empty_run = 0
        self._skip = 0
        self._leftover: SynthBatch | None = None  # copied by a take that was interrupted
        self._interrupted: _Position | None = None
        self._turn = 0
        self._released = [0] * config.producers  # by ring: batches whose slot is free again
        self._drop_to = [0] * config.producers  # by ring: batches below are discarded when they arrive

        slots = -(-config.in_flight // config.producers)
        layout = Layout(planner.batch_size, self.image_shape, slots)
        work = Work(engine, engine_options, planner.seed, config.threads, config.nice)
        self._fleet = Fleet(config, _backend(config, engine_options), layout, self._judge_nbytes, work)
        self._recorder = Recorder(self.class_names, tuple(reasons), config.producers)
        self._recent = self._new_recent()
        self._started = False
        self._announced = False
        self._taking = threading.Lock()
        self._owner = os.getpid()
        self._finalizer = weakref.finalize(self, Fleet.close, self._fleet)

    @classmethod
    def from_config(
        cls,
        config: str | os.PathLike | Config,
        overrides: Sequence[str] = (),
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> "Stream":
        """The stream that a configuration describes: a YAML file, a bundled name ("digits") or a `Config`.

        `overrides` are "a.b=value" strings. Prepares what is missing (prior, bank, judge) before it returns.
        """
        from streamaug.config import load
        from streamaug.prepare import prepare

        resolved = config if isinstance(config, Config) else load(Path(config), overrides)
        prepared = prepare(resolved)
        return cls(
            prepared.planner,
            engine=prepared.engine,
            engine_options=prepared.engine_options,
            image_shape=prepared.image_shape,
            config=resolved.stream,
            judge_state=prepared.judge_state,
            class_names=prepared.class_names,
            loader_config=resolved.loader,
            rank=rank,
            world_size=world_size,
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

        Raises ProducerError (the producer's exception with its traceback, or its last words), a UsageError that the
        engine raised, EverythingRejected after `max_empty` batches without an accepted image. An interrupted call
        loses nothing: the next one delivers the same images.
        """
        self.start()
        with self._taking:
            while self._skip:
                self._skip -= len(self._take(min(self._skip, self.config.batch_size), discard=True))
            return self._take(n)

    def _take(self, n: int, discard: bool = False) -> SynthBatch:
        out = SynthBatch.empty(n, self.image_shape)
        return out

"""The producers of one stream: allocates their rings, starts them, notices deaths and hangs, replaces, ends
them."""

import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from streamaug import errors
from streamaug.config import StreamConfig
from streamaug.errors import ProducerError, StreamaugError, UsageError
from streamaug.orders import OrderBatch
from streamaug.stream import memory
from streamaug.stream.backends import Lane, ProcessProducer, Producer, ThreadProducer, Work
from streamaug.stream.producer import hint, wait
from streamaug.stream.ring import FAILED, READY, STARTING, Layout, Mailboxes, Ring

log = logging.getLogger("streamaug")

_LOOK_SECONDS = 0.25  # how often the keeper looks when nothing wakes it
_BACKENDS: dict[str, Callable[[Lane, Work], Producer]] = {"process": ProcessProducer, "local": ThreadProducer}


@dataclass
class _Watch:
    """What the keeper knows about one producer."""

    producer: Producer
    lane: Lane
    incarnation: int = 0
    started: float = 0.0  # monotonic seconds
    published_at_start: int = 0
    deaths: int = 0  # in a row, without a batch in between
    progress: tuple[int, int] = (0, 0)
    stalled: float = 0.0  # seconds without progress while there was work
    reported: bool = False


class Fleet:
    """`config.producers` producers and their rings. Nothing is allocated before `start`.

    A thread, the keeper, starts producers and replaces dead ones at once, also while the trainer is busy
    elsewhere. All other methods are for the trainer's thread.
    """

    def __init__(self, config: StreamConfig, backend: str, layout: Layout, judge_nbytes: int, work: Work):
        """Raises MemoryTooSmall when the rings cannot fit."""
        self.config = config
        self.layout = layout
        self.work = work
        self.backend = backend
        self.mailboxes: Mailboxes | None = None
        self.restarts = 0
        self._memory_kind: memory.Kind = "private" if backend == "local" else memory.choose(config.memory)
        self._mailboxes_shape = (config.in_flight + 2, judge_nbytes) if judge_nbytes else None
        self._mailboxes_memory: memory.Memory | None = None
        self._watches: list[_Watch] = []
        self._failure: StreamaugError | None = None
        self._closed = False
        self._release_in_keeper = False
        self._spawned = threading.Event()
        self._keeper: threading.Thread | None = None
        self._stir: tuple[int, int] | None = None  # a pipe that wakes the keeper
        self._owner = os.getpid()
        self._require_memory()

    @property
    def nbytes(self) -> int:
        """Shared memory of all rings and mailboxes together."""
        mailboxes = Mailboxes.nbytes(*self._mailboxes_shape) if self._mailboxes_shape else 0
        return self.config.producers * self.layout.nbytes + mailboxes

    @property
    def rings(self) -> list[Ring]:
        return [watch.lane.ring for watch in self._watches]

    @property
    def pids(self) -> list[int]:
        return [pid for watch in self._watches if (pid := watch.producer.pid) is not None]

    @property
    def ready_ns(self) -> int:
        """When the last producer became ready, CLOCK_MONOTONIC nanoseconds."""
        return max(ring.ready_ns for ring in self.rings)

    def start(self) -> None:
        """Allocate the rings and start the producers, without waiting for them to be ready."""
        self.check()
        if self._keeper is None:
            self._begin()
        self._spawned.wait()
        self.check()

    def _begin(self) -> None:
        self._require_memory()
        try:
            self._allocate()
        except BaseException as error:
            self.release()
            if isinstance(error, OSError):
                raise StreamaugError(f"the ring cannot be made: {error.strerror} (see ulimit -n)") from None
            raise
        keeper = threading.Thread(target=self._keep, name="streamaug-keeper", daemon=True)
        try:
            keeper.start()
        except RuntimeError as error:
            self.release()
            raise StreamaugError(f"producers cannot be watched: {error} (see ulimit -u)") from None
        self._keeper = keeper

    def issue(self, at: int, order: OrderBatch, judge_post: int) -> int:
        """Write an order into ring `at` and wake its producer; returns the order's number there."""
        lane = self._watches[at].lane
        number = lane.ring.issue(order, judge_post)
        hint(lane.wake)
        return number

    def skip_to(self, at: int, number: int) -> None:
        lane = self._watches[at].lane
        lane.ring.skip_to(number)
        hint(lane.wake)

    def wait(self, seconds: float) -> None:
        """Sleep until a producer says that something changed, at most `seconds`."""
        wait([watch.lane.wake for watch in self._watches], seconds)

    def check(self) -> None:
        """Raise what went wrong for good: the producer's own exception, or that it keeps dying."""
        self._hear_failures()
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise StreamaugError("the stream was closed")

    def _hear_failures(self) -> None:
        # Not in `check`, whose variables the exception that it raises would keep alive, the rings' memory with them.
        for watch in self._watches:
            if watch.lane.ring.state == FAILED:
                self._failed(_remote_error(watch.lane.ring))

    @property
    def closed(self) -> bool:
        return self._closed

    def stop(self) -> None:
        """End all producers. Does nothing in a process forked from the trainer."""
        if os.getpid() != self._owner:
            return
        self._closed = True
        if self._keeper is not None and self._stir is not None:
            os.write(self._stir[1], b"!")
            self._keeper.join()

    def close(self) -> None:
        """End all producers and give the memory back."""
        if threading.current_thread() in self._own_threads():  # garbage collection may strike on any thread
            self._closed = self._release_in_keeper = True
        elif os.getpid() == self._owner:
            self.stop()
            self.release()

    def _own_threads(self) -> set[threading.Thread | None]:
        return {self._keeper} | {watch.producer.thread for watch in self._watches}

    def release(self) -> None:
        for watch in self._watches:
            watch.lane.close()
        self._watches = []
        self.mailboxes = None
        if self._mailboxes_memory is not None:
            self._mailboxes_memory.close()
            self._mailboxes_memory = None
        if self._stir is not None:
            for fd in self._stir:
                os.close(fd)
            self._stir = None

    def _require_memory(self) -> None:
        layout = self.layout
        what = (
            f"{self.config.producers} x {layout.slots} slots of {layout.batch_size} images of "
            f"{'x'.join(str(side) for side in layout.image_shape)}"
        )
        memory.require(self._memory_kind, self.nbytes, what)

    def _allocate(self) -> None:
        self._stir = os.pipe()
        if self._mailboxes_shape is not None:
            self._mailboxes_memory = memory.Memory.create(self._memory_kind, Mailboxes.nbytes(*self._mailboxes_shape))
            self.mailboxes = Mailboxes(self._mailboxes_memory, *self._mailboxes_shape)
            self.mailboxes.clear()
        for _ in range(self.config.producers):
            ours, theirs = socket.socketpair()
            block = memory.Memory.create(self._memory_kind, self.layout.nbytes)
            lane = Lane(
                self.layout,
                block,
                Ring(block, self.layout),
                ours,
                theirs,
                self._mailboxes_memory,
                self.mailboxes,
                self._mailboxes_shape,
            )
            self._watches.append(_Watch(_BACKENDS[self.backend](lane, self.work), lane))

    # The keeper's thread. Producers are started here because on Linux a producer dies with the thread that
    # started it: this one lives exactly as long as the fleet, whichever thread the user calls from.

    def _keep(self) -> None:
        try:
            for watch in self._watches:
                self._spawn(watch)
            self._spawned.set()
            last = time.monotonic()
            while not self._closed:
                self._doze()
                now = time.monotonic()
                # A longer gap means that we were stopped ourselves: it is no evidence against a producer.
                elapsed, last = min(now - last, 2 * _LOOK_SECONDS), now
                for watch in self._watches:
                    self._look(watch, now, elapsed)
        except Exception as error:
            self._failed(StreamaugError(f"the producers cannot be watched any more: {error!r}"))
        finally:
            self._spawned.set()
            self._end()

    def _end(self) -> None:
        for watch in self._watches:
            watch.lane.ring.close()
            hint(watch.lane.wake)
        for watch in self._watches:
            watch.producer.stop()
        if self._release_in_keeper:
            self.release()

    def _doze(self) -> None:
        poll = select.poll()
        assert self._stir is not None
        poll.register(self._stir[0], select.POLLIN)
        if self._failure is None:
            for watch in self._watches:
                for fd in watch.producer.watch_fds:
                    poll.register(fd, select.POLLIN)
        poll.poll(_LOOK_SECONDS * 1000)

    def _spawn(self, watch: _Watch) -> None:
        ring = watch.lane.ring
        ring.restart()
        watch.started = time.monotonic()
        watch.published_at_start = ring.published
        watch.stalled, watch.reported = 0.0, False
        try:
            watch.producer.start(watch.incarnation)
        except (OSError, RuntimeError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            self._failed(StreamaugError(f"a producer cannot be started: {why} (see ulimit -n and ulimit -u)"))
        watch.incarnation += 1

    def _look(self, watch: _Watch, now: float, elapsed: float) -> None:
        if self._failure is not None:
            return
        watch.producer.look()
        ring = watch.lane.ring
        if not watch.producer.alive():
            self._replace(watch)
        elif ring.state == STARTING:
            if now - watch.started > self.config.start_timeout:
                watch.producer.kill()
                self._failed(
                    ProducerError(
                        f"a producer was not ready after {self.config.start_timeout:g} s "
                        f"(stream.start_timeout): {watch.producer.last_words()}"
                    )
                )
        elif ring.state == READY:
            self._look_for_stall(watch, elapsed)

    def _look_for_stall(self, watch: _Watch, elapsed: float) -> None:
        ring = watch.lane.ring
        progress = (ring.published, ring.last_beat_ns)
        if progress != watch.progress or ring.issued <= ring.published:
            watch.progress, watch.stalled, watch.reported = progress, 0.0, False
            return
        watch.stalled += elapsed
        if watch.stalled > self.config.stall_timeout and not watch.reported:
            watch.reported = True
            log.warning("%s has made no progress for %.0f s", _name(watch), watch.stalled)
        # The first batch may compile and load for as long as starting may take.
        first = ring.published == watch.published_at_start
        limit = max(self.config.hang_timeout, self.config.start_timeout if first else 0.0)
        if watch.stalled > limit:
            log.warning("%s made no progress for %.0f s: replacing it", _name(watch), watch.stalled)
            watch.producer.kill()
            if not watch.producer.can_restart:
                self._failed(
                    ProducerError(
                        f"the producer's thread made no progress for {watch.stalled:.0f} s "
                        "(stream.hang_timeout); only stream.backend: process can replace a hung producer"
                    )
                )

    def _replace(self, watch: _Watch) -> None:
        ring = watch.lane.ring
        if ring.state == FAILED:
            self._failed(_remote_error(ring))
            return
        if ring.published > watch.published_at_start:
            watch.deaths = 0
        watch.deaths += 1
        words = watch.producer.last_words()
        if watch.deaths > self.config.max_restarts or not watch.producer.can_restart:
            self._failed(
                ProducerError(
                    f"a producer died {watch.deaths} times in a row without completing a batch "
                    f"(stream.max_restarts: {self.config.max_restarts}): {words}"
                )
            )
            return
        log.warning("a producer died, starting another, which makes its last batch again: %s", words)
        self.restarts += 1
        self._spawn(watch)

    def _failed(self, error: StreamaugError) -> None:
        if self._failure is None:
            self._failure = error


def _name(watch: _Watch) -> str:
    pid = watch.producer.pid
    return f"the producer (process {pid})" if pid else "the producer"


def _remote_error(ring: Ring) -> StreamaugError:
    """The exception a producer left, as the trainer raises it: a refusal keeps its class, the rest is
    ProducerError."""
    report = ring.error()
    where = "while starting" if report["k"] is None else f"in batch {report['k']}"
    kind = getattr(errors, report["type"], None)
    if isinstance(kind, type) and issubclass(kind, UsageError) and kind is not errors.MissingExtra:
        error: StreamaugError = kind(report["message"])
        error.add_note(f"Raised by the producer {where}:\n{report['traceback']}")
        return error
    return ProducerError(
        f"the producer raised {report['type']} {where}: {report['message']}\n\n{report['traceback'].rstrip()}"
    )

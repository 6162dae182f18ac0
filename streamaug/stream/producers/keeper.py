"""The thread that keeps a fleet's producers: starts them, notices deaths and hangs, replaces and ends them."""

import logging
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from streamaug import errors
from streamaug.config import StreamConfig
from streamaug.errors import ProducerError, StreamaugError, UsageError
from streamaug.stream.producer import hint
from streamaug.stream.producers.backends import Lane, Producer
from streamaug.stream.ring import FAILED, READY, STARTING, Ring

log = logging.getLogger("streamaug")

_LOOK_SECONDS = 0.25  # how often it looks when nothing wakes it
_LATCH_SECONDS = 0.001
_LAST_SECONDS = 1.0  # what its thread gets to go, once all is done


class Latch:
    """Set once. A signal handler may wait for it in the middle of whatever it interrupted, also of a wait for it:
    `threading.Event` has a lock, which the one would hold and the other need."""

    def __init__(self) -> None:
        self.is_set = False

    def set(self) -> None:
        self.is_set = True

    def wait(self) -> None:
        while not self.is_set:
            time.sleep(_LATCH_SECONDS)


@dataclass
class Watch:
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


class Keeper:
    """Starts producers and replaces dead ones at once, also while the trainer is busy elsewhere.

    Producers are started in its thread because on Linux a producer dies with the thread that started it: this one lives
    exactly as long as the fleet, whichever thread the user calls from.
    """

    def __init__(
        self,
        config: StreamConfig,
        watches: Sequence[Watch],
        finish: Callable[[], Callable[[], None] | None],
        give_up: Callable[[], None],
    ):
        """finish: called in the thread when all producers have ended; what it returns, if anything, is done after
        `stop` has returned. give_up: called in the thread, more than once, while there is a failure."""
        self.failure: StreamaugError | None = None
        self.restarts = 0
        self.spawned = Latch()  # every producer was started once, or none will be
        self._config = config
        self._watches = watches
        self._finish = finish
        self._give_up = give_up
        self._closed = False
        self._ended = Latch()
        self._rest: Callable[[], None] | None = None
        self._stirred, self._stir = socket.socketpair()  # what is sent there wakes it
        # Whose it is to keep the producers, settled at once and for good: a thread's, or nobody's when there was none
        # before the end. Whether one that is being started will run is not known when that is interrupted.
        self._keeping: dict[str, threading.Thread | None] = {}

    def start(self) -> None:
        """Does nothing when it runs already; may be called again when it was interrupted. Raises RuntimeError when the
        system has no thread left."""
        if not self._keeping:
            threading.Thread(target=self._run, name="streamaug-keeper", daemon=True).start()

    def is_this_thread(self) -> bool:
        return self._keeping.get("by") is threading.current_thread()

    @property
    def has_ended(self) -> bool:
        """Whether all producers have, and `finish` was called."""
        return self._ended.is_set

    def leave(self) -> None:
        """End all producers, soon."""
        self._closed = True

    def stop(self) -> None:
        """End all producers; returns when they have ended."""
        self._closed = True
        hint(self._stir)
        thread = self._keeping.setdefault("by", None)
        if thread is None:
            self.spawned.set()
            return
        self._ended.wait()
        if self._rest is None and not self.is_this_thread():
            thread.join(_LAST_SECONDS)

    def release(self) -> None:
        """After the thread's end, or in it."""
        self._stirred.close()
        self._stir.close()

    def failed(self, error: StreamaugError) -> None:
        """The first failure is for good."""
        if self.failure is None:
            self.failure = error

    def _run(self) -> None:
        here = threading.current_thread()
        if self._keeping.setdefault("by", here) is not here:
            return
        try:
            self._keep()
            self._end()
            self._rest = self._finish()
        finally:
            self._ended.set()
        if self._rest is not None:
            self._rest()

    def _keep(self) -> None:
        try:
            for watch in self._watches:
                self._spawn(watch)
            self.spawned.set()
            last = time.monotonic()
            while not self._closed:
                self._doze()
                now = time.monotonic()
                # A longer gap means that we were stopped ourselves: it is no evidence against a producer.
                elapsed, last = min(now - last, 2 * _LOOK_SECONDS), now
                for watch in self._watches:
                    self._look(watch, now, elapsed)
                if self.failure is not None:
                    self._give_up()
        except StreamaugError as error:
            self.failed(error.with_traceback(None))  # whose frames would keep the rings' memory
        except Exception as error:
            self.failed(StreamaugError(f"the producers cannot be watched any more: {error!r}"))
        finally:
            self.spawned.set()

    def _end(self) -> None:
        for watch in self._watches:
            watch.lane.ring.close()
            hint(watch.lane.wake)
        for watch in self._watches:
            watch.producer.stop()

    def _doze(self) -> None:
        poll = select.poll()
        poll.register(self._stirred, select.POLLIN)
        if self.failure is None:
            for watch in self._watches:
                for fd in watch.producer.watch_fds:
                    poll.register(fd, select.POLLIN)
        poll.poll(_LOOK_SECONDS * 1000)

    def _spawn(self, watch: Watch) -> None:
        ring = watch.lane.ring
        ring.restart()
        watch.started = time.monotonic()
        watch.published_at_start = ring.published
        watch.stalled, watch.reported = 0.0, False
        try:
            watch.producer.start(watch.incarnation)
        except (OSError, RuntimeError) as error:
            self.failed(_cannot_be_started(error))
        watch.incarnation += 1

    def _look(self, watch: Watch, now: float, elapsed: float) -> None:
        if self.failure is not None:
            return
        ring = watch.lane.ring
        try:
            watch.producer.look()
            alive = watch.producer.alive()
        except OSError as error:
            self.failed(_cannot_be_started(error))
            return
        if not alive:
            self._replace(watch)
        elif ring.state == STARTING:
            if now - watch.started > self._config.start_timeout:
                watch.producer.kill()
                self.failed(
                    ProducerError(
                        f"a producer was not ready after {self._config.start_timeout:g} s "
                        f"(stream.start_timeout): {watch.producer.last_words()}"
                    )
                )
        elif ring.state == READY:
            self._look_for_stall(watch, elapsed)

    def _look_for_stall(self, watch: Watch, elapsed: float) -> None:
        ring = watch.lane.ring
        progress = (ring.published, ring.last_beat_ns)
        if progress != watch.progress or ring.issued <= ring.published:
            watch.progress, watch.stalled, watch.reported = progress, 0.0, False
            return
        watch.stalled += elapsed
        if watch.stalled > self._config.stall_timeout and not watch.reported:
            watch.reported = True
            log.warning("%s has made no progress for %.0f s", _name(watch), watch.stalled)
        # The first batch may compile and load for as long as starting may take.
        first = ring.published == watch.published_at_start
        limit = max(self._config.hang_timeout, self._config.start_timeout if first else 0.0)
        if watch.stalled > limit:
            log.warning("%s made no progress for %.0f s: replacing it", _name(watch), watch.stalled)
            watch.producer.kill()
            if not watch.producer.can_restart:
                self.failed(
                    ProducerError(
                        f"the producer's thread made no progress for {watch.stalled:.0f} s "
                        "(stream.hang_timeout); only stream.backend: process can replace a hung producer"
                    )
                )
            watch.stalled = 0.0  # once is enough, until its end is seen

    def _replace(self, watch: Watch) -> None:
        ring = watch.lane.ring
        if ring.state == FAILED:
            self.failed(remote_error(ring))
            return
        was_idle = ring.state == READY and ring.issued <= ring.published  # it may have died of another rank's batch
        if ring.published > watch.published_at_start or was_idle:
            watch.deaths = 0
        watch.deaths += 1
        words = watch.producer.last_words()
        if watch.deaths > self._config.max_restarts or not watch.producer.can_restart:
            self.failed(
                ProducerError(
                    f"a producer died {watch.deaths} times in a row without completing a batch "
                    f"(stream.max_restarts: {self._config.max_restarts}): {words}"
                )
            )
            return
        log.warning("a producer died, starting another, which makes its last batch again: %s", words)
        self.restarts += 1
        self._spawn(watch)


def _name(watch: Watch) -> str:
    pid = watch.producer.pid
    return f"the producer (process {pid})" if pid else "the producer"


def _cannot_be_started(error: OSError | RuntimeError) -> StreamaugError:
    why = error.strerror if isinstance(error, OSError) else error
    return StreamaugError(f"a producer cannot be started: {why} (see ulimit -n and ulimit -u)")


def remote_error(ring: Ring) -> StreamaugError:
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

"""A producer that makes the orders of several trainers with one engine: `python -m` this module.

The trainers are the ranks of one machine. Each hands in its ring over a connection, which says by its end that the ring
is no longer wanted. Beats go to all rings: none is to be taken for hung because another's batch is in work.
"""

import contextlib
import json
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NoReturn

from streamaug.errors import StreamaugError, UsageError
from streamaug.stream.engine import Engine
from streamaug.stream.producer import (
    IDLE_SECONDS,
    End,
    Failure,
    Maker,
    Mapped,
    behind_the_trainer,
    build_as_told,
    enter,
    leave,
    wait,
)
from streamaug.stream.producers.sockets import Peer, receive, send, was_shut_down
from streamaug.stream.ring.memory import Memory
from streamaug.stream.ring.pixels import Images

log = logging.getLogger("streamaug")

_LOOK_SECONDS = 0.05  # how often it looks who comes and goes while a batch is made


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    spec: dict[str, Any] = json.load(sys.stdin)
    run(spec, parent=spec["trainer_pid"])


def run(spec: dict[str, Any], parent: int) -> NoReturn:
    """Serve, and end the process. The death of `parent` ends it whatever it is doing.

    spec: `backends.Work.spec`, with the descriptors of a listening socket and of its pulse in "fds".
    """
    enter(spec, parent, None)
    pulse = Memory.attach(spec["fds"]["pulse"], 8)
    host = Host(socket.socket(fileno=spec["fds"]["listening"]), pulse.view.cast("q"), spec)
    with contextlib.ExitStack() as ends:

        def build() -> Engine:
            ends.enter_context(behind_the_trainer(spec["device"]))
            return build_as_told(spec)

        host.serve(build)
    leave()


class Guest:
    """A trainer whose ring is served."""

    def __init__(self, connection: socket.socket):
        """Raises StreamaugError when it is another user's."""
        self.peer = Peer.of(connection)
        self.connection = connection
        self.end: End | None = None  # once it has handed in its ring
        self.admitted = False  # its orders may be made
        self._mapped: Mapped | None = None
        self._images: Images | None = None

    def hand_in(self, spec: dict[str, Any]) -> End:
        """Map its ring; spec: `backends.Lane.spec`, with its descriptors in "fds"."""
        self._mapped = Mapped(spec)
        self.end = End(self._mapped.ring, self._mapped.mailboxes, socket.socket(fileno=spec["fds"]["wake"]))
        return self.end

    def place(self, spec: dict[str, Any], device: str) -> None:
        assert self._mapped is not None
        self._images = self._mapped.place({**spec, "device": device})

    def close(self) -> None:
        self.peer.close()
        self.connection.close()
        if self._images is not None:
            self._images.close()
        if self.end is not None:
            self.end.wake.close()
        if self._mapped is not None:
            self._mapped.close()
        self.end = self._mapped = self._images = None


class Host:
    """Serves whoever connects, in turn, until nobody may come any more and the last one has left."""

    def __init__(self, listening: socket.socket, pulse: memoryview, spec: dict[str, Any]):
        self._listening = listening
        self._pulse = pulse
        self._spec = spec
        self._guests: list[Guest] = []  # whose turn it is next comes first
        self._maker: Maker | None = None
        self._in_work: Guest | None = None
        self._failure: Failure | None = None
        self._open = True  # others may come
        self._looked = 0.0  # when, monotonic seconds
        self._poll = select.poll()
        self._calls: dict[int, Callable[[], None]] = {}  # by descriptor: what to do when it has something to say
        self._watch(listening.fileno(), self._accept)

    def serve(self, build: Callable[[], Engine]) -> None:
        """An exception is left in every ring, those that come later included."""
        try:
            self._maker = Maker(build(), self._alongside)
            while self._is_wanted:
                self._look(0.0)
                guest = self._next()
                if guest is not None:
                    self._make(guest)
                else:
                    self._look(IDLE_SECONDS)
        except BaseException as error:
            self._fail(error)
        while self._is_wanted:
            self._look(IDLE_SECONDS)

    @property
    def _is_wanted(self) -> bool:
        return self._open or bool(self._guests)

    def _ends(self) -> list[End]:
        return [guest.end for guest in self._guests if guest.end is not None]

    def _next(self) -> Guest | None:
        """Whose turn it is of those with an order; the next time, all others come first."""
        for guest in self._guests:
            if guest.admitted and guest.end is not None and guest.end.has_order:
                self._guests.remove(guest)
                self._guests.append(guest)
                return guest
        return None

    def _make(self, guest: Guest) -> None:
        assert self._maker is not None and guest.end is not None
        self._in_work = guest
        try:
            self._maker.make(guest.end)
        finally:
            self._in_work = None
            if guest.end.deserted:
                guest.close()

    def _alongside(self) -> None:
        """While a batch is made, whenever the engine says that it goes on."""
        if time.monotonic() - self._looked > _LOOK_SECONDS:
            self._look(0.0)

    def _fail(self, error: BaseException) -> None:
        ends = self._ends()
        self._failure = Failure.of(error, next((end.k for end in ends if end.k is not None), None))
        self._maker = None
        for guest in self._guests:
            if guest.admitted and guest.end is not None and not guest.end.ring.closing:
                guest.end.fail(self._failure)  # who was refused may be reading why

    # Who comes and goes.

    def _look(self, seconds: float) -> None:
        """Wait for so long until anybody has something to say, and take it in."""
        self._pulse[0] = time.monotonic_ns()
        for end in self._ends():
            end.beat()
        ready = [fd for fd, _ in self._poll.poll(seconds * 1000)]
        # Newcomers last: their descriptors may have the numbers of some that were ready and are closed now.
        for fd in sorted(ready, key=self._listening.fileno().__eq__):
            if fd in self._calls:
                self._calls[fd]()
        self._looked = time.monotonic()

    def _watch(self, fd: int, call: Callable[[], None]) -> None:
        self._calls[fd] = call
        self._poll.register(fd, select.POLLIN)

    def _forget(self, fd: int) -> None:
        del self._calls[fd]
        self._poll.unregister(fd)

    def _accept(self) -> None:
        try:
            connection, _ = self._listening.accept()
        except BlockingIOError:
            if was_shut_down(self._listening):
                self._forget(self._listening.fileno())
                self._open = False
            return
        connection.setblocking(False)
        try:
            guest = Guest(connection)
        except StreamaugError as error:
            log.warning("%s", error)
            connection.close()
            return
        self._guests.append(guest)
        self._watch(connection.fileno(), partial(self._hear, guest))
        if guest.peer.pidfd is not None:
            self._watch(guest.peer.pidfd, partial(self._leave, guest))

    def _hear(self, guest: Guest) -> None:
        try:
            said, fds = receive(guest.connection)
        except BlockingIOError:
            return
        if said is None:
            self._leave(guest)
        elif len(fds) == len(said["fds"]):
            self._admit(guest, {**said, "fds": dict(zip(said["fds"], fds, strict=True))})
        else:
            for fd in fds:
                os.close(fd)
            log.warning("a ring cannot be served: the process that makes images has no descriptors left (ulimit -n)")
            self._leave(guest)

    def _admit(self, guest: Guest, spec: dict[str, Any]) -> None:
        end = guest.hand_in(spec)
        self._watch(end.wake.fileno(), partial(wait, [end.wake], 0.0))
        self._count()
        failure = self._failure
        if failure is None:
            try:
                _require_agreement(agreed(self._spec), spec["agreed"])
                guest.place(spec, self._spec["device"])
                assert self._maker is not None
                self._maker.admit(end)
                guest.admitted = True
            except Exception as error:
                failure = Failure.of(error, None)
        if failure is not None:
            end.fail(failure)
        pidfd = os.pidfd_open(os.getpid())
        send(guest.connection, {"pid": os.getpid()}, [pidfd])
        os.close(pidfd)

    def _leave(self, guest: Guest) -> None:
        """Its ring is given back, once nothing is made for it."""
        self._guests.remove(guest)
        self._forget(guest.connection.fileno())
        if guest.peer.pidfd is not None:
            self._forget(guest.peer.pidfd)
        if guest.end is not None:
            self._forget(guest.end.wake.fileno())
            guest.end.deserted = True
        if guest is not self._in_work:
            guest.close()
        self._count()

    def _count(self) -> None:
        ends = self._ends()
        for end in ends:
            end.ring.share(len(ends))


def agreed(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Of `backends.Work.spec`, what must be the same for all who share a producer, besides the plan."""
    return {"stream.threads": spec["threads"], "engine": spec["engine"]}


def _require_agreement(here: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    for name, value in here.items():
        if there[name] != value:
            raise UsageError(
                f"{name} is {there[name]} on this rank and {value} on the rank that keeps the shared producers: give "
                "all ranks of a machine the same, or set stream.shared: false"
            )


if __name__ == "__main__":
    main()

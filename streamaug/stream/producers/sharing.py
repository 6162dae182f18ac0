"""Producers that the ranks of one machine share: one rank keeps their processes, every rank hands its rings in to them.

Each rank plans, orders and receives by itself, over rings of its own. What is shared is who makes the images: the
process in `producers.host`, started, watched and replaced by the rank that keeps it. The socket on which it listens is
open in that rank's process too, so that those who lost it find its successor in the same place.
"""

import contextlib
import errno
import json
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from streamaug.config import StreamConfig
from streamaug.errors import ProducerError, UsageError
from streamaug.stream.producers.backends import Lane, Program, Work
from streamaug.stream.producers.host import agreed
from streamaug.stream.producers.sockets import Peer, connect, hang_up, listen, receive, send
from streamaug.stream.producers.starting import Starter
from streamaug.stream.ranks import Meeting
from streamaug.stream.ring.memory import Memory

_LOOK_SECONDS = 0.25
_LAST_SECONDS = 0.2  # what the keeper's process gets to end after what it kept, before it is taken to live


class Sharing:
    """What the ranks of this machine agreed on: who keeps the producers that they share, and where they listen."""

    def __init__(self, meeting: Meeting, config: StreamConfig):
        # Its first batch may compile and load for as long as starting may take.
        self.silence = max(config.hang_timeout, config.start_timeout)
        self.keeps = False
        self._meeting = meeting
        self._producers = config.producers
        self._listening: list[tuple[socket.socket, str]] = []  # with their addresses
        self._addresses: list[str] = []
        self._keeper = ""
        self._left_behind: list[KeptHost] = []

    def meet(self) -> None:
        """Ask the process group's store; waits for nobody. May be called again when it was interrupted. Raises
        UsageError when ranks want different numbers of producers."""
        while len(self._listening) < self._producers:
            self._listening.append(listen())
        rank, addresses = self._meeting.rank, [address for _, address in self._listening]
        mine = {"rank": rank, "pid": os.getpid(), "addresses": addresses}
        found = json.loads(self._meeting.agree(json.dumps(mine)))
        self._addresses = found["addresses"]
        self.keeps = self._addresses == addresses
        self._keeper = f"rank {found['rank']} (process {found['pid']})"
        if not self.keeps:
            self.withdraw()
        if len(self._addresses) != self._producers:
            raise UsageError(
                f"stream.producers is {self._producers} on rank {rank} and {len(self._addresses)} on rank "
                f"{found['rank']}, which keeps the producers they share: give all ranks of a machine the same"
            )

    def producer(self, lane: Lane, work: Work, at: int) -> "SharedProducer":
        return SharedProducer(lane, work, self, at)

    def listening(self, at: int) -> socket.socket:
        return self._listening[at][0]

    def connect(self, at: int) -> socket.socket:
        """Raises ProducerError when nobody keeps the producer any more."""
        with contextlib.suppress(ConnectionRefusedError):
            return connect(self._addresses[at])
        raise self.over()

    def over(self) -> ProducerError:
        return ProducerError(
            f"the producers that the ranks of this machine share (stream.shared) were kept by {self._keeper}, which "
            "has ended, failed or closed its stream: its own log says why"
        )

    @property
    def keeper(self) -> str:
        return self._keeper

    def withdraw(self) -> None:
        """Let nobody in any more: those who wait are sent away, and hosts end with the last one whom they serve."""
        for listening, _ in self._listening:
            with contextlib.suppress(OSError):
                listening.shutdown(socket.SHUT_RDWR)
            with contextlib.suppress(OSError):
                while True:
                    listening.accept()[0].close()
            listening.close()
        self._listening = []

    def leave_behind(self, host: "KeptHost") -> None:
        """It goes on for the other ranks, and ends with the last of them."""
        self._left_behind.append(host)

    def rest(self, starter: Starter | None) -> Callable[[], None] | None:
        """What is to be done until those left behind have ended; None when there are none."""
        return partial(self._stay, starter) if self._left_behind else None

    def _stay(self, starter: Starter | None) -> None:
        """A process ends with the thread that started it: it stays."""
        while hosts := [host for host in self._left_behind if host.alive()]:
            poll = select.poll()
            for host in hosts:
                host.look()
                if host.is_hung:
                    host.kill()
                for fd in host.watch_fds:
                    poll.register(fd, select.POLLIN)
            poll.poll(_LOOK_SECONDS * 1000)
        for host in self._left_behind:
            host.close()
        if starter is not None:
            starter.close()


class KeptHost(Program):
    """The process that serves all ranks, as the one has it that keeps it."""

    def __init__(self, silence: float):
        """silence: seconds without a sign of life after which it is hung."""
        super().__init__()
        self._silence = silence
        self._pulse: Memory | None = None  # when it last looked who comes and goes, monotonic nanoseconds

    def start(self, listening: socket.socket, lane: Lane, work: Work, spec: dict[str, Any]) -> None:
        self._pulse = self._pulse or Memory.create("memfd", 8)
        assert lane.starter is not None and self._pulse.fd is not None
        self._pulse.view.cast("q")[0] = time.monotonic_ns()
        self.run(lane.starter, spec, {"listening": listening.fileno(), "pulse": self._pulse.fd}, work)

    @property
    def is_hung(self) -> bool:
        assert self._pulse is not None
        return time.monotonic_ns() - self._pulse.view.cast("q")[0] > self._silence * 1e9

    def close(self) -> None:
        """After its end."""
        if self._pulse is not None:
            self._pulse.close()


class SharedProducer:
    """One lane's part of a shared producer."""

    can_restart = True
    thread: threading.Thread | None = None

    def __init__(self, lane: Lane, work: Work, sharing: Sharing, at: int):
        self._lane = lane
        self._work = work
        self._sharing = sharing
        self._at = at
        self._host = KeptHost(sharing.silence) if sharing.keeps else None  # where it is this rank's to keep
        self._connection: socket.socket | None = None
        self._keeper: Peer | None = None
        self._serving: tuple[int, int] | None = None  # the process that said it took the ring in, and a handle of it

    @property
    def pid(self) -> int | None:
        if self._host is not None:
            return self._host.pid
        return None if self._serving is None else self._serving[0]

    @property
    def watch_fds(self) -> list[int]:
        fds = [] if self._host is None else self._host.watch_fds
        if self._connection is not None:
            fds.append(self._connection.fileno())
        if self._host is None and self._keeper is not None and self._keeper.pidfd is not None:
            fds.append(self._keeper.pidfd)
        return fds

    def start(self, incarnation: int) -> None:
        """Raises ProducerError when the rank that keeps the producer has ended."""
        self._hang_up()
        lane, work, spec = self._lane, self._work, self._work.spec(incarnation)
        if self._host is not None:
            self._host.start(self._sharing.listening(self._at), lane, work, spec)
        self._connection = self._sharing.connect(self._at)
        if self._keeper is None:
            self._keeper = Peer.of(self._connection)
        fds = lane.fds()
        send(self._connection, {**lane.spec(), "agreed": agreed(spec), "fds": list(fds)}, list(fds.values()))

    def alive(self) -> bool:
        """Raises ProducerError when the rank that keeps the producer has ended."""
        lost = self._connection is None
        if self._host is not None:
            if lost:
                self._host.kill()  # it has ended, or is of no use to this ring
            return self._host.alive()
        if self._keeper is not None and self._keeper.has_ended(_LAST_SECONDS if lost else 0.0):
            raise self._sharing.over()
        return not lost

    def look(self) -> None:
        if self._host is not None:
            self._host.look()
        with contextlib.suppress(BlockingIOError):
            while self._connection is not None:
                said, fds = receive(self._connection)
                if said is None:
                    self._hang_up()
                elif fds:
                    self._serving = said["pid"], fds[0]
                else:
                    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def kill(self) -> None:
        if self._host is not None:
            self._host.kill()
        elif self._serving is not None:  # who keeps it buries it
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._serving[1], signal.SIGKILL)

    def stop(self) -> None:
        """Where other ranks are served too, it goes on without this one."""
        others = self._lane.ring.sharers > 1
        if self._host is not None:
            self._sharing.withdraw()
        self._hang_up()
        if self._keeper is not None:
            self._keeper.close()
            self._keeper = None
        if self._host is not None and others:
            self._sharing.leave_behind(self._host)
        elif self._host is not None:
            self._host.stop()
            self._host.close()

    def last_words(self) -> str:
        if self._host is not None:
            return self._host.last_words()
        return f"it is shared and kept by {self._sharing.keeper}, whose log has its last words"

    def _hang_up(self) -> None:
        if self._connection is not None:
            hang_up(self._connection)
            self._connection = None
        if self._serving is not None:
            os.close(self._serving[1])
            self._serving = None

"""Who runs producers: a thread (`local`) or a process of its own (`process`), behind one interface.

A backend for other machines implements the same interface. Its `Producer` lives on the trainer's machine, with a thread
that stands in for the producer at the ring: it takes orders from the lane's ring as they are issued and sends them off,
each with the live judge's state that it is the first to name (`slot.judge_post`, `mailboxes.read`); fills the slot of
each batch that comes back, in order, finishes it and publishes it. What it owes the ring is what `producer.serve` does:

- start at `ring.published`, whatever was under way before; `ring.ready` once the engine is built;
- `ring.beat` when there was word from the other side, and not otherwise: silence is how a hang is noticed;
- pass `ring.skipping_to` on, publish batches below it as abandoned when they are not made, and end on `ring.closing`;
- `ring.fail` with the exception of the other side, after which it may end;
- `hint(lane.wake_producer)` after each of these; it waits on that socket, on which the trainer's hints arrive;
- `Slot.finish` wants this machine's monotonic clock: the arrival is the end, less the time spent the beginning.

The other side can be `producer.serve` on a ring of its own memory. `alive` is false when the connection is lost: the
fleet then calls `start` again, and what was on its way is made again.
"""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from streamaug.errors import StreamaugError
from streamaug.stream.engine import Engine
from streamaug.stream.producer import behind_the_trainer, build_engine, serve
from streamaug.stream.producers.processes import Child, Output
from streamaug.stream.producers.starting import Starter
from streamaug.stream.ring import Layout, Mailboxes, Ring, cuda
from streamaug.stream.ring.memory import Memory
from streamaug.stream.ring.pixels import Images

_LEAVE_SECONDS = 0.5  # what a producer gets to leave by itself
_DIE_SECONDS = 5.0  # a killed process that the system cannot end sooner (it waits for a device) is left behind


@dataclass
class Lane:
    """One producer's share of what the trainer allocated: it outlives every incarnation of the producer."""

    layout: Layout
    memory: Memory
    ring: Ring
    wake: socket.socket  # the trainer's end
    wake_producer: socket.socket
    mailboxes_memory: Memory | None
    mailboxes: Mailboxes | None
    mailboxes_shape: tuple[int, int] | None  # (count, bytes of a state)
    starter: Starter | None = None  # of processes
    images: Images | None = None  # where they are not simply in `memory`

    def spec(self) -> dict[str, Any]:
        """What a process must know of it, as JSON; its descriptors come apart from that."""
        return {
            "layout": asdict(self.layout),
            "mailboxes": self.mailboxes_shape,
            "images": None if self.images is None else self.images.share(),
        }

    def fds(self) -> dict[str, int]:
        assert self.memory.fd is not None
        fds = {"ring": self.memory.fd, "wake": self.wake_producer.fileno()}
        if self.mailboxes_memory is not None and self.mailboxes_memory.fd is not None:
            fds["mailboxes"] = self.mailboxes_memory.fd
        return fds

    def close(self) -> None:
        self.wake.close()
        self.wake_producer.close()
        if self.images is not None:
            self.images.close()
        self.memory.close()


@dataclass(frozen=True)
class Work:
    """What a producer runs, and how."""

    engine: str  # "module:function"
    options: dict
    seed: int
    threads: int
    nice: int
    environment: Mapping[str, str] = field(default_factory=dict)  # besides the trainer's own
    device: str = "cpu"  # cpu, cuda or cuda:1, as the producer itself counts

    def spec(self, incarnation: int) -> dict[str, Any]:
        """What a process must know of it, as JSON; its environment comes apart from that."""
        return {
            "engine": self.engine,
            "options": self.options,
            "seed": self.seed,
            "threads": self.threads,
            "nice": self.nice,
            "fault": os.environ.get("STREAMAUG_FAULT") if incarnation == 0 else None,
            "device": self.device,
            "cuda": cuda.PROVIDER,
        }


class Producer(Protocol):
    """One producer, over all its incarnations."""

    can_restart: bool
    thread: threading.Thread | None  # of the trainer, in which it runs

    @property
    def pid(self) -> int | None:
        """The process that can be killed; None when there is none of its own."""

    @property
    def watch_fds(self) -> list[int]:
        """Descriptors that become readable when `look` has something to do."""

    def start(self, incarnation: int) -> None: ...

    def alive(self) -> bool: ...

    def look(self) -> None:
        """Take in what the producer says, without waiting."""

    def kill(self) -> None:
        """End it at once, and everything it started. No effect on a thread."""

    def stop(self) -> None:
        """End it after it was asked to leave through the ring; returns when it is gone or cannot be ended."""

    def last_words(self) -> str:
        """How it ended and the end of what it printed."""


class ThreadProducer:
    """Backend `local`: the loop in a thread of the trainer."""

    can_restart = False
    pid = None

    def __init__(self, lane: Lane, work: Work):
        self._lane = lane
        self._work = work
        self.thread: threading.Thread | None = None

    @property
    def watch_fds(self) -> list[int]:
        return []

    def start(self, incarnation: int) -> None:
        ring = Ring(self._lane.memory, self._lane.layout)
        ring.place(self._lane.images)
        self.thread = threading.Thread(target=self._serve, args=(ring,), name="streamaug-producer", daemon=True)
        self.thread.start()

    def _serve(self, ring: Ring) -> None:
        lane, work = self._lane, self._work
        with contextlib.ExitStack() as ends:

            def build() -> Engine:
                ends.enter_context(behind_the_trainer(work.device))
                return build_engine(work.engine, work.options)

            serve(ring, lane.mailboxes, lane.wake_producer, build)

    def alive(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def look(self) -> None:
        pass

    def kill(self) -> None:
        pass

    def stop(self) -> None:
        if self.thread is not None:
            self.thread.join(timeout=10)

    def last_words(self) -> str:
        return "its thread ended"


class Program:
    """A program that the trainer runs in a process of its own, over all its incarnations."""

    def __init__(self) -> None:
        self._child: Child | None = None
        self._output: Output | None = None
        self._end = "it was not started"

    @property
    def pid(self) -> int | None:
        return self._child.pid if self._child is not None else None

    @property
    def watch_fds(self) -> list[int]:
        return [fd for source in (self._child, self._output) if source is not None for fd in source.watch_fds]

    def run(self, starter: Starter, spec: Mapping[str, Any], fds: Mapping[str, int], work: Work) -> None:
        self._end = "still running"
        output = Output()
        try:
            self._child = starter.start(spec, fds, _environment(work), output)
        except BaseException:
            output.close()
            raise
        self._output = output

    def alive(self) -> bool:
        if self._child is None:
            return False
        code = self._child.poll()
        if code is None:
            return True
        assert self._output is not None
        self._output.close()
        self._end = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        if code == -signal.SIGKILL:
            self._end += " (the system does that when memory runs out)"
        self._child = None
        return False

    def look(self) -> None:
        if self._output is not None:
            self._output.read()

    def kill(self) -> None:
        if self._child is not None:
            self._child.kill()

    def stop(self) -> None:
        self._await_end(_LEAVE_SECONDS)
        self.kill()
        self._await_end(_DIE_SECONDS)

    def _await_end(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, StreamaugError):  # what kept it from starting
                if not self.alive():
                    return
            time.sleep(0.005)

    def last_words(self) -> str:
        text = "" if self._output is None else self._output.last_words
        return f"{self._end}; its last words:\n{text}" if text else f"{self._end} without a word"


class ProcessProducer(Program):
    """Backend `process`: `streamaug.stream.producer` in a process of its own."""

    can_restart = True
    thread: threading.Thread | None = None

    def __init__(self, lane: Lane, work: Work):
        super().__init__()
        self._lane = lane
        self._work = work

    def start(self, incarnation: int) -> None:
        lane, work = self._lane, self._work
        assert lane.starter is not None
        self.run(lane.starter, {**work.spec(incarnation), **lane.spec()}, lane.fds(), work)


def _environment(work: Work) -> dict[str, str]:
    """What must be set before the libraries that read it are imported."""
    environment = {**os.environ, **work.environment}
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        environment[name] = str(work.threads)
    environment["PYTHONHASHSEED"] = str(work.seed % 2**32)  # the order of sets may decide an order of additions
    package = str(Path(__file__).resolve().parents[3])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package, environment.get("PYTHONPATH")]))
    return environment

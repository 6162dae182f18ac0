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
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

from streamaug.stream.memory import Memory
from streamaug.stream.producer import build_engine, serve
from streamaug.stream.ring import Layout, Mailboxes, Ring

log = logging.getLogger("streamaug")

_TAIL_NBYTES = 16384  # of what a producer prints, the end is kept
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

    def close(self) -> None:
        self.wake.close()
        self.wake_producer.close()
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
        lane, work = self._lane, self._work
        self.thread = threading.Thread(
            target=serve,
            args=(
                Ring(lane.memory, lane.layout),
                lane.mailboxes,
                lane.wake_producer,
                lambda: build_engine(work.engine, work.options),
            ),
            name="streamaug-producer",
            daemon=True,
        )
        self.thread.start()

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


class ProcessProducer:
    """Backend `process`: `python -m streamaug.stream.producer`, in a session of its own."""

    can_restart = True
    thread: threading.Thread | None = None

    def __init__(self, lane: Lane, work: Work):
        self._lane = lane
        self._work = work
        self._process: subprocess.Popen | None = None
        self._output: int | None = None  # what it prints arrives here
        self._pidfd: int | None = None
        self._end = "it was not started"
        self._tail = b""
        self._line = b""  # printed so far of the last line

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    @property
    def watch_fds(self) -> list[int]:
        return [fd for fd in (self._pidfd, self._output) if fd is not None]

    def start(self, incarnation: int) -> None:
        lane, work = self._lane, self._work
        fds = {"ring": lane.memory.fd, "wake": lane.wake_producer.fileno()}
        if lane.mailboxes_memory is not None:
            fds["mailboxes"] = lane.mailboxes_memory.fd
        spec = {
            "engine": work.engine,
            "options": work.options,
            "seed": work.seed,
            "threads": work.threads,
            "nice": work.nice,
            "trainer_pid": os.getpid(),
            "sys_path": [path or os.getcwd() for path in sys.path],
            "fault": os.environ.get("STREAMAUG_FAULT") if incarnation == 0 else None,
            "layout": asdict(lane.layout),
            "mailboxes": lane.mailboxes_shape,
            "fds": fds,
        }
        self._end = "still running"
        self._tail = b""
        output, producers_end = os.pipe()
        os.set_blocking(output, False)
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "streamaug.stream.producer"],
                stdin=subprocess.PIPE,
                stdout=producers_end,
                stderr=producers_end,
                pass_fds=[fd for fd in fds.values() if fd is not None],
                env=_environment(work),
                start_new_session=True,  # a terminal's Ctrl-C is for the trainer
            )
        except OSError:
            os.close(output)
            raise
        finally:
            os.close(producers_end)
        self._process, self._output = process, output
        with contextlib.suppress(OSError, AttributeError):  # without it, the keeper looks at intervals
            self._pidfd = os.pidfd_open(process.pid)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin as stdin:  # a death is noticed elsewhere
            stdin.write(json.dumps(spec).encode())

    def alive(self) -> bool:
        if self._process is None:
            return False
        if not _has_exited(self._process.pid):
            return True
        self._bury(self._process)
        return False

    def look(self) -> None:
        while self._output is not None:
            try:
                text = os.read(self._output, 65536)
            except BlockingIOError:
                return
            if not text:
                os.close(self._output)
                self._output = None
            self._tail = (self._tail + text)[-_TAIL_NBYTES:]
            *lines, self._line = (self._line + text).split(b"\n")
            for line in lines:
                _log_again(line.decode(errors="replace"))

    def kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def stop(self) -> None:
        deadline = time.monotonic() + _LEAVE_SECONDS
        while self.alive() and time.monotonic() < deadline:
            time.sleep(0.005)
        self.kill()
        deadline = time.monotonic() + _DIE_SECONDS
        while self.alive() and time.monotonic() < deadline:
            time.sleep(0.005)

    def last_words(self) -> str:
        text = self._tail.decode(errors="replace").strip()
        return f"{self._end}; its last words:\n{text}" if text else f"{self._end} without a word"

    def _bury(self, process: subprocess.Popen) -> None:
        """Its descendants first, while its process group cannot have been taken over by anybody else."""
        self.kill()
        code = process.wait()
        self.look()
        self._end = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        if code == -signal.SIGKILL:
            self._end += " (the system does that when memory runs out)"
        self._process = None
        for fd in self.watch_fds:
            os.close(fd)
        self._pidfd = self._output = None


def _log_again(line: str) -> None:
    """Log what a producer printed: its own log records at their level, the rest for debugging."""
    level, _, rest = line.partition(" ")
    known = logging.getLevelNamesMapping().get(level)
    if known is not None and rest.startswith("streamaug"):
        log.log(known, "producer: %s", rest.partition(": ")[2])
    else:
        log.debug("producer: %s", line)


def _has_exited(pid: int) -> bool:
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def _environment(work: Work) -> dict[str, str]:
    """What must be set before the libraries that read it are imported."""
    environment = {**os.environ, **work.environment}
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        environment[name] = str(work.threads)
    environment["PYTHONHASHSEED"] = str(work.seed % 2**32)  # the order of sets may decide an order of additions
    package = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package, environment.get("PYTHONPATH")]))
    return environment

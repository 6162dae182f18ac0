"""A producer's process as the trainer holds it: started, watched by descriptor, heard, killed and buried."""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from typing import IO, Any, Protocol

log = logging.getLogger("streamaug")

_TAIL_NBYTES = 16384  # of what a process prints, the end is kept


HOST, PRODUCER = "streamaug.stream.producers.host", "streamaug.stream.producer"


def program(fds: Iterable[str]) -> str:
    """The module that a producer's process runs, by what its descriptors are for."""
    return HOST if "listening" in fds else PRODUCER


class Child(Protocol):
    """A producer's process. For the keeper's thread alone."""

    @property
    def pid(self) -> int | None:
        """None while it is being made."""

    @property
    def watch_fds(self) -> list[int]:
        """Descriptors that become readable when `poll` has something to do."""

    def poll(self) -> int | None:
        """How it ended, as in subprocess; None while it runs. Whatever it started has ended with it."""

    def kill(self) -> None: ...


class Output:
    """What a process prints: logged again, and the end of it kept."""

    def __init__(self) -> None:
        self._fd: int | None
        self._fd, self.writer = os.pipe()
        os.set_blocking(self._fd, False)
        self._tail = b""
        self._line = b""  # printed so far of the last line

    @property
    def watch_fds(self) -> list[int]:
        return [] if self._fd is None else [self._fd]

    def read(self) -> None:
        """Take in what there is, without waiting."""
        while self._fd is not None:
            try:
                text = os.read(self._fd, 65536)
            except BlockingIOError:
                return
            if not text:
                self._close_reader()
            self._tail = (self._tail + text)[-_TAIL_NBYTES:]
            *lines, self._line = (self._line + text).split(b"\n")
            for line in lines:
                _log_again(line.decode(errors="replace"))

    def close_writer(self) -> None:
        """The process has it: only then does its end show."""
        if self.writer >= 0:
            os.close(self.writer)
            self.writer = -1

    def close(self) -> None:
        self.close_writer()
        self.read()
        self._close_reader()

    def _close_reader(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def adopt(self, other: "Output") -> None:
        """What another process printed is this one's last words."""
        other.read()
        self._tail = other._tail

    @property
    def last_words(self) -> str:
        return self._tail.decode(errors="replace").strip()


def _log_again(line: str) -> None:
    """Log what a producer printed: its own log records at their level, the rest for debugging."""
    level, _, rest = line.partition(" ")
    known = logging.getLevelNamesMapping().get(level)
    if known is not None and rest.startswith("streamaug"):
        log.log(known, "producer: %s", rest.partition(": ")[2])
    else:
        log.debug("producer: %s", line)


class Spawned:
    """A producer afresh, in a session of its own: a terminal's Ctrl-C is for the trainer."""

    def __init__(self, spec: Mapping[str, Any], fds: Mapping[str, int], environment: Mapping[str, str], output: Output):
        self._process = start(program(fds), {**spec, "fds": dict(fds)}, fds.values(), environment, output)
        self._pidfd: int | None = None
        with contextlib.suppress(OSError, AttributeError):  # without it, the keeper looks at intervals
            self._pidfd = os.pidfd_open(self._process.pid)
        output.close_writer()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    @property
    def watch_fds(self) -> list[int]:
        return [] if self._pidfd is None else [self._pidfd]

    def poll(self) -> int | None:
        if self._process.returncode is None and _has_exited(self._process.pid):
            self.kill()  # its descendants, while its process group cannot have been taken over by anybody else
            self._process.wait()
            if self._pidfd is not None:
                os.close(self._pidfd)
                self._pidfd = None
        return self._process.returncode

    def kill(self) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)


def start(
    module: str, spec: Mapping[str, Any], fds: Iterable[int], environment: Mapping[str, str], output: Output
) -> subprocess.Popen:
    """`python -m MODULE` with the spec as JSON on its standard input, in a session of its own."""
    with _unnamed_file() as stdin:  # no pipe, which holds little: it may be long before it is read, or never
        stdin.write(json.dumps(spec).encode())
        stdin.seek(0)
        return subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=stdin,
            stdout=output.writer,
            stderr=output.writer,
            pass_fds=list(fds),
            env=environment,
            start_new_session=True,
        )


def _unnamed_file() -> IO[bytes]:
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("streamaug-spec"), "w+b")
    return tempfile.TemporaryFile()


def _has_exited(pid: int) -> bool:
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def sys_path() -> list[str]:
    """The trainer's, for a process that has another working folder or script."""
    return [path or os.getcwd() for path in sys.path]

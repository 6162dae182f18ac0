"""The trainer's end of `forkserver`: producers that are copies of one process, which has imported what they need."""

import contextlib
import errno
import json
import logging
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from typing import Any

from streamaug.errors import UsageError
from streamaug.stream.producers.forkserver import DESCRIPTORS, MESSAGE_NBYTES
from streamaug.stream.producers.processes import Output, Spawned, start, sys_path

log = logging.getLogger("streamaug")

_REPORT_SECONDS = 1.0  # what the fork server gets to say how a copy ended that is gone
_DIE_SECONDS = 5.0  # what it gets to end once it is killed
_KILLED = -int(signal.SIGKILL)


class ForkServer:
    """The trainer's end of `streamaug.stream.producers.forkserver`: one process for one environment."""

    def __init__(self, module: str, environment: Mapping[str, str]):
        self.environment = dict(environment)
        self.threads = 1  # that it had when it was last asked
        self.output = Output()
        self._requests = 0
        self.copies: dict[int, Forked] = {}
        with contextlib.ExitStack() as undo:
            undo.callback(self.output.close)
            self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.callback(self._control.close)
            self._control.setblocking(False)
            spec = {"module": module, "socket": theirs.fileno(), "trainer_pid": os.getpid(), "sys_path": sys_path()}
            with theirs:
                self._process = start(
                    "streamaug.stream.producers.forkserver", spec, [theirs.fileno()], environment, self.output
                )
            undo.pop_all()
        self.output.close_writer()

    @property
    def watch_fds(self) -> list[int]:
        return [self._control.fileno(), *self.output.watch_fds]

    @property
    def exit_code(self) -> int | None:
        return self._process.poll()

    def ask(self, copy: "Forked", fds: Mapping[str, int]) -> None:
        self._requests += 1
        self.copies[self._requests] = copy
        request = {"request": self._requests, "fds": list(fds)}
        with contextlib.suppress(BrokenPipeError, ConnectionError):  # its death is noticed elsewhere
            socket.send_fds(self._control, [json.dumps(request).encode()], list(fds.values()))

    def look(self) -> None:
        """Hear what it says, without waiting."""
        self.output.read()
        while True:
            try:
                message, descriptors, _, _ = socket.recv_fds(self._control, MESSAGE_NBYTES, DESCRIPTORS)
            except (BlockingIOError, ConnectionError):
                return
            if not message:
                return
            self._hear(json.loads(message), descriptors)

    def _hear(self, said: Mapping[str, int], descriptors: list[int]) -> None:
        if "pid" in said:
            if not descriptors:  # the system had none left to give
                self.kill()
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            self.copies[said["request"]].began(said["pid"], descriptors[0])
            return
        copy = self.copies.pop(said["request"])
        if "exit_code" in said:
            copy.ended(said["exit_code"])
            return
        self.threads = said["threads"]
        if not self.copies:
            self.kill()  # it is of no use
        copy.refused(self.threads)

    def kill(self) -> None:
        """End it, and with it every copy."""
        if self._process.poll() is None:
            self._process.kill()

    def close(self) -> None:
        self.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # the system cannot end it sooner: it is left behind
            self._process.wait(_DIE_SECONDS)
        self._control.close()
        self.output.close()


class Forked:
    """A copy of the fork server; a process started afresh where that is not as good as one."""

    def __init__(
        self,
        server: ForkServer,
        spec: Mapping[str, Any],
        fds: Mapping[str, int],
        output: Output,
        *,
        required: bool,
    ):
        self._server = server
        self._as_asked = spec, fds, server.environment, output
        self._output = output
        self._required = required
        self._afresh: Spawned | None = None
        self._pid: int | None = None
        self._pidfd: int | None = None
        self._exit_code: int | None = None
        self._gone_since: float | None = None  # when it was seen to have ended without word from the server
        with open(os.memfd_create("streamaug-spec"), "wb") as file:
            file.write(json.dumps(spec).encode())
            file.seek(0)
            server.ask(self, {**fds, "output": output.writer, "spec": file.fileno()})

    @property
    def pid(self) -> int | None:
        return self._pid if self._afresh is None else self._afresh.pid

    @property
    def watch_fds(self) -> list[int]:
        if self._afresh is not None:
            return self._afresh.watch_fds
        return [*self._server.watch_fds, *([] if self._pidfd is None else [self._pidfd])]

    def began(self, pid: int, pidfd: int) -> None:
        self._pid, self._pidfd = pid, pidfd
        self._output.close_writer()

    def ended(self, exit_code: int) -> None:
        self._exit_code = exit_code
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None

    def refused(self, threads: int) -> None:
        """The server has more threads than one: a copy would have their locks, and not them."""
        why = f"importing what the producer needs starts {threads - 1} threads, which a copy would lack"
        if self._required:
            self._exit_code = 1
            raise UsageError(f"stream.start_method is forkserver, but {why}; auto and spawn work")
        log.info("producers are started afresh: %s", why)
        self._afresh = Spawned(*self._as_asked)

    def poll(self) -> int | None:
        self._server.look()
        if self._afresh is not None:
            return self._afresh.poll()
        if self._exit_code is None and self._server.exit_code is not None:
            self._server.look()  # at what it said before its end
            self._poll_without_server()
        elif self._exit_code is None and self._is_gone():
            self._gone_since = self._gone_since or time.monotonic()
            if time.monotonic() - self._gone_since > _REPORT_SECONDS:
                self._server.kill()
        return self._exit_code

    def _poll_without_server(self) -> None:
        """The kernel ends copies when the server ends."""
        if self._exit_code is not None:
            return
        if self._pidfd is not None and not self._is_gone():
            self.kill()
            return
        if self._pidfd is None:
            self._output.adopt(self._server.output)
        exit_code = self._server.exit_code
        self.ended(exit_code if self._pidfd is None and exit_code else _KILLED)
        self._server.copies = {at: copy for at, copy in self._server.copies.items() if copy is not self}

    def _is_gone(self) -> bool:
        if self._pidfd is None:
            return False
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(0))

    def kill(self) -> None:
        if self._afresh is not None:
            self._afresh.kill()
        elif self._pidfd is not None:  # the server ends what it started
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        elif self._exit_code is None:
            self._server.kill()

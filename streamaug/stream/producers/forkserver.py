"""A process that has imported what producers import and copies itself for each of them: `python -m` this module.

It starts no thread, runs no model and touches no GPU, so that a copy is as good as a new process. The trainer asks over
a socket, with the descriptors a producer needs, and hears of each copy's start and end.
"""

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import traceback
from typing import Any, NoReturn

from streamaug.stream.producer import die_with
from streamaug.stream.producers.processes import program

MESSAGE_NBYTES = 65536
DESCRIPTORS = 8  # in one message, at most


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    spec: dict[str, Any] = json.load(sys.stdin)
    die_with(spec["trainer_pid"])
    sys.path[:] = spec["sys_path"]
    preload(spec["module"])
    gc.collect()
    gc.freeze()  # a collection in a copy would write to, and so copy, every page
    _Server(socket.socket(fileno=spec["socket"])).serve()


def preload(module: str) -> None:
    """Import the engine's module and what it names in PRELOAD: what its `build` imports when it is called.

    What cannot be imported is the copy's affair, which says so to the trainer.
    """
    with contextlib.suppress(Exception):
        for name in getattr(importlib.import_module(module), "PRELOAD", ()):
            importlib.import_module(name)


class _Server:
    def __init__(self, control: socket.socket):
        self._control = control
        self._pid = os.getpid()
        self._copies: dict[int, tuple[int, int]] = {}  # by process descriptor: the request and the process

    def serve(self) -> None:
        """Until the trainer closes its end."""
        while True:
            poll = select.poll()
            for fd in (self._control.fileno(), *self._copies):
                poll.register(fd, select.POLLIN)
            for fd, _ in poll.poll():
                if fd in self._copies:
                    self._bury(fd)
                    continue
                message, descriptors, _, _ = socket.recv_fds(self._control, MESSAGE_NBYTES, DESCRIPTORS)
                if not message:
                    os._exit(0)  # copies die with this process
                self._copy(json.loads(message), descriptors)

    def _copy(self, request: dict[str, Any], descriptors: list[int]) -> None:
        threads = _threads()
        if threads > 1:  # whatever lock another thread holds would stay locked in the copy
            self._tell({"request": request["request"], "threads": threads})
        else:
            pid = os.fork()
            if pid == 0:
                self._become_a_producer(dict(zip(request["fds"], descriptors, strict=True)))
            pidfd = os.pidfd_open(pid)
            self._copies[pidfd] = request["request"], pid
            self._tell({"request": request["request"], "pid": pid}, [pidfd])
        for fd in descriptors:
            os.close(fd)

    def _bury(self, pidfd: int) -> None:
        """Its descendants first, while its process group cannot have been taken over by anybody else."""
        request, pid = self._copies.pop(pidfd)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        os.close(pidfd)
        self._tell({"request": request, "exit_code": os.waitstatus_to_exitcode(status)})

    def _tell(self, message: dict[str, int], descriptors: list[int] | None = None) -> None:
        try:
            socket.send_fds(self._control, [json.dumps(message).encode()], descriptors or [])
        except OSError:
            os._exit(1)  # the trainer is gone

    def _become_a_producer(self, fds: dict[str, int]) -> NoReturn:
        try:
            os.setsid()
            self._control.close()
            for sibling in self._copies:
                os.close(sibling)
            for fd in (1, 2):
                os.dup2(fds["output"], fd)
            os.close(fds.pop("output"))
            with open(fds.pop("spec")) as file:
                spec = json.load(file)
            importlib.import_module(program(fds)).run(spec | {"fds": fds}, parent=self._pid)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(1)


def _threads() -> int:
    return len(os.listdir("/proc/self/task"))


if __name__ == "__main__":
    main()

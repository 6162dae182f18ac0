"""By which method a fleet's producers start: afresh (`spawn`), or as copies of a process that has imported what they
need (`forkserver`), which takes tenths of a second where torch and diffusers take many.
"""

import os
import sys
from collections.abc import Mapping
from typing import Any, Literal

from streamaug.errors import UsageError
from streamaug.stream.producers.copies import Forked, ForkServer
from streamaug.stream.producers.processes import Child, Output, Spawned, sys_path

StartMethod = Literal["spawn", "forkserver", "forkserver if safe"]


class Starter:
    """Starts the producers of one fleet."""

    def __init__(self, method: StartMethod, module: str):
        """module: of the engine."""
        self._method = method
        self._module = module
        self._servers: list[ForkServer] = []

    def start(
        self, spec: Mapping[str, Any], fds: Mapping[str, int], environment: Mapping[str, str], output: Output
    ) -> Child:
        spec = {**spec, "trainer_pid": os.getpid(), "sys_path": sys_path()}
        if self._method == "spawn":
            return Spawned(spec, fds, environment, output)
        server = self._server(environment)
        if server.threads > 1:
            return Spawned(spec, fds, environment, output)
        return Forked(server, spec, fds, output, required=self._method == "forkserver")

    def _server(self, environment: Mapping[str, str]) -> ForkServer:
        """The one for this environment; another when that has ended."""
        for server in list(self._servers):
            if server.environment == environment and (server.exit_code is None or server.threads > 1):
                return server
            if server.exit_code is not None and not server.copies:
                server.close()
                self._servers.remove(server)
        self._servers.append(ForkServer(self._module, environment))
        return self._servers[-1]

    def close(self) -> None:
        """After the producers have ended."""
        for server in self._servers:
            server.close()
        self._servers.clear()


def start_method(setting: str, *, on_gpu: bool, threads: int) -> StartMethod:
    """What stream.start_method (auto, spawn, forkserver) means for producers with so many threads each.

    auto is forkserver where a copy is as good as a new process: on the CPU of a Linux machine, with one thread (numpy's
    BLAS starts its threads when it is imported). Raises UsageError when forkserver was asked for and cannot be had.
    """
    possible = sys.platform == "linux" and hasattr(os, "pidfd_open")
    if setting == "auto":
        return "forkserver if safe" if possible and not on_gpu and threads == 1 else "spawn"
    if setting == "forkserver" and on_gpu:
        raise UsageError(
            "stream.start_method is forkserver, which is for producers on the CPU: a copied process cannot use a GPU "
            "safely; auto and spawn work"
        )
    if setting == "forkserver" and not possible:
        raise UsageError(f"stream.start_method is forkserver, which {sys.platform} cannot do; auto and spawn work")
    return setting  # type: ignore[return-value]

"""What a process holds, and which processes are there: how tests and the torture see that nothing is left behind."""

import contextlib
import gc
import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from streamaug.errors import StreamaugError
from streamaug.stream.ring.memory import NAME_PREFIX, SHM_FOLDER


@dataclass(frozen=True)
class Footprint:
    """What a process holds."""

    descriptors: int
    threads: int
    mappings: int  # of rings
    children: int
    names: int  # of rings, in the folders for shared memory and temporary files


def footprint() -> Footprint:
    gc.collect()
    maps = Path("/proc/self/maps").read_text().splitlines()
    folders = [folder for folder in (SHM_FOLDER, tempfile.gettempdir()) if os.path.isdir(folder)]
    return Footprint(
        descriptors=len(os.listdir("/proc/self/fd")),
        threads=threading.active_count(),
        mappings=sum("memfd:streamaug" in line or line.endswith("(deleted)") for line in maps),
        children=len(children()),
        names=sum(name.startswith(NAME_PREFIX) for folder in folders for name in os.listdir(folder)),
    )


def children(of: int | None = None) -> list[int]:
    """Processes that this one, or another, started, whether running or not yet waited for."""
    parent = os.getpid() if of is None else of
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(path.parent.name))
    return found


def running(pid: int) -> bool:
    """True unless the process is gone or only waits for being waited for."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def memory_mb(pid: int | str = "self") -> float:
    """Resident memory of a process without what it maps from files and shares with others, in MB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1000
    raise StreamaugError("this system does not say how much memory a process has: no RssAnon in /proc/PID/status")


def until(condition: Callable[[], bool], seconds: float, otherwise: str) -> None:
    """Wait for a condition; raises StreamaugError when it takes longer."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            raise StreamaugError(f"after {seconds:g} s: {otherwise}")
        time.sleep(0.01)

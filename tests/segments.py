"""What stays behind in /dev/shm. Another process may be running other tests meanwhile, and has segments there too."""

import contextlib
import os
import re
import time
from pathlib import Path

FOLDER = "/dev/shm"


def names() -> set[str]:
    """Of all segments; none where the system has no such folder."""
    return set(os.listdir(FOLDER)) if os.path.isdir(FOLDER) else set()


def left_behind(before: set[str], seconds: float = 5.0) -> set[str]:
    """Names that are new since `before` and still there after `seconds`, but for those of a process that lives and is
    neither this one nor below it: PyTorch names its segments by process, of others it is told by who maps them."""
    ends = time.monotonic() + seconds
    while left := {name for name in names() - before if not _of_others(name)}:
        if time.monotonic() > ends:
            break
        time.sleep(0.02)
    return left


def _of_others(name: str) -> bool:
    named = re.match(r"torch_(\d+)_", name)
    owners = [int(named[1])] if named else _mapping(f"{FOLDER}/{name}")
    lineages = [lineage for lineage in map(_lineage, owners) if lineage]
    return bool(lineages) and not any(os.getpid() in lineage for lineage in lineages)


def _mapping(file: str) -> list[int]:
    """The living processes that have this file mapped."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended, or is another user's
            if file in (process / "maps").read_text(errors="replace"):
                found.append(int(process.name))
    return found


def _lineage(pid: int) -> list[int]:
    """A living process and those above it; none when it has ended."""
    found = []
    while pid:
        try:
            status = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            break
        state, parent = status.rpartition(")")[2].split()[:2]
        if state == "Z" and not found:
            break
        found.append(pid)
        pid = int(parent)
    return found

"""What stays behind in /dev/shm. Another process may be running other tests meanwhile, and has segments there too."""

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
    neither this one nor below it: PyTorch names its segments by process, other libraries unlink theirs at once."""
    ends = time.monotonic() + seconds
    while left := {name for name in names() - before if not _of_others(name)}:
        if time.monotonic() > ends:
            break
        time.sleep(0.02)
    return left


def _of_others(name: str) -> bool:
    named = re.match(r"torch_(\d+)_", name)
    if named is None:
        return False
    lineage = _lineage(int(named[1]))
    return bool(lineage) and os.getpid() not in lineage


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

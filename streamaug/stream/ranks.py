"""Which rank a stream is of, and how it finds the others of its machine: the orders of one run are dealt out among the
ranks that train together.
"""

import contextlib
import os
import platform
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from streamaug.errors import StreamaugError, UsageError

_opened: Counter[str] = Counter()  # by plan: streams of this process that share their producers


def own_rank(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """(rank, number of ranks): as given, else of torch's default process group, else the only one.

    Raises UsageError when one of the two is given alone, or they do not fit together.
    """
    if (rank is None) != (world_size is None):
        raise UsageError(f"rank {rank} and world_size {world_size}: give both, or neither for the process group's")
    if rank is None or world_size is None:
        import torch.distributed as dist

        in_group = dist.is_available() and dist.is_initialized()
        return (dist.get_rank(), dist.get_world_size()) if in_group else (0, 1)
    if not 0 <= rank < world_size:
        raise UsageError(f"rank {rank} of world_size {world_size}: ranks count from 0 to world_size - 1")
    return rank, world_size


def trainers_here(world_size: int) -> int:
    """Ranks on this machine, as torchrun says; all of them where nobody says it."""
    told = os.environ.get("LOCAL_WORLD_SIZE", "")
    return min(int(told), world_size) if told.isdecimal() and int(told) else world_size


class Meeting:
    """Where the ranks of one machine that share producers agree: the store of torch's default process group.

    It is no collective: nobody waits for anybody, and the order among the user's own collectives does not matter. The
    n-th stream of a plan meets the n-th ones of the same plan in other ranks' processes.
    """

    def __init__(self, plan: str, rank: int):
        """plan: its hash. Raises UsageError where there is no process group, or the system cannot share."""
        import torch.distributed as dist

        if sys.platform != "linux" or not hasattr(os, "pidfd_open"):
            raise UsageError(f"stream.shared needs Linux, this is {sys.platform}: stream.shared: false works")
        if not (dist.is_available() and dist.is_initialized()):
            raise UsageError(
                "stream.shared needs torch's default process group, in whose store ranks find each other: call "
                "torch.distributed.init_process_group before the stream is made, or set stream.shared: false"
            )
        self.rank = rank
        self._store: Any = dist.distributed_c10d._get_default_store()
        self._key = f"streamaug/{plan}/{_opened[plan]}/{_machine()}"
        _opened[plan] += 1

    def agree(self, proposal: str) -> str:
        """The first proposal that any of the ranks made; not empty."""
        try:
            return self._store.compare_set(self._key, "", proposal).decode()
        except RuntimeError as error:
            raise StreamaugError(f"the process group's store does not answer (stream.shared): {error}") from None


def _machine() -> str:
    """Processes for which this is the same can connect to each other."""
    boot = platform.node()
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.stat('/proc/self/ns/net').st_ino}/{os.geteuid()}"

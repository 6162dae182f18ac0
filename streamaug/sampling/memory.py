"""Memory: what a batch takes, measured on small batches before the first one, and how large a batch can be."""

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

_STATM = Path("/proc/self/statm")
_LOOK_SECONDS = 0.001  # how often a process's size is read
_SPARE = 0.9  # a proposed batch takes at most this share of what is free: blocks never fit without gaps


class Enough(Exception):
    """What was to be measured is measured: leave the sampler."""


def after_one_evaluation() -> Callable[[], None]:
    """An `on_evaluation` that raises Enough before the second."""
    evaluations = 0

    def before_evaluation() -> None:
        nonlocal evaluations
        evaluations += 1
        if evaluations > 1:
            raise Enough

    return before_evaluation


@dataclass(frozen=True)
class Estimate:
    """Bytes of n images: `fixed + each * n`."""

    fixed: float
    each: float

    def bytes(self, n: int) -> float:
        return self.fixed + self.each * n


def estimate(peak: Callable[[int], int], size: int) -> Estimate:
    """What `size` images take, from the peaks of an eighth and of a quarter of them, or of one and two.

    peak: bytes that so many images take at most at a time.
    """
    larger = max(size // 4, min(size, 2))
    smaller = larger // 2
    peak(smaller or 1)  # whatever is allocated once, at the first
    high = float(peak(larger))
    if not smaller:
        return Estimate(0.0, high)
    # Never falling, and never steeper than in proportion, whatever the noise of the measurement.
    each = min(max((high - peak(smaller)) / (larger - smaller), 0.0), high / larger)
    return Estimate(high - each * larger, each)


def largest(needed: Callable[[int], float], free: int, size: int) -> int:
    """The largest batch below `size` that fits with room to spare, a multiple of 8 from 8 on; 0 if none does."""
    found = next((n for n in range(size - 1, 0, -1) if needed(n) <= _SPARE * free), 0)
    return found - found % 8 if found > 8 else found


def measurable(device: torch.device) -> bool:
    """Whether this system says what a process takes."""
    return device.type == "cuda" or _STATM.exists()


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """By how many bytes the memory in use on the device grew at most while `run` ran."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return max(torch.cuda.max_memory_allocated(device) - before, 0)
    _give_back_freed()
    before = _resident_bytes()
    with _watched() as highest:
        run()
    return max(highest[0] - before, 0)


def free_on_gpu(device: torch.device) -> int:
    """Bytes that this process can still allocate: free on the GPU, or in torch's cache."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


@contextlib.contextmanager
def _watched() -> Iterator[list[int]]:
    """Yields [the largest resident set so far], kept up to date by a thread until the end."""
    highest, done = [_resident_bytes()], threading.Event()

    def look() -> None:
        while not done.wait(_LOOK_SECONDS):
            highest[0] = max(highest[0], _resident_bytes())

    watching = threading.Thread(target=look, name="streamaug-memory", daemon=True)
    watching.start()
    try:
        yield highest
    finally:
        done.set()
        watching.join()
        highest[0] = max(highest[0], _resident_bytes())


def _resident_bytes() -> int:
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _give_back_freed() -> None:
    """What the allocator keeps of freed blocks would hide as much of the growth."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)

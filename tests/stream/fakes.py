"""Small streams without a model, and what tests ask of them."""

import contextlib
import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import asdict

from streamaug.stream.batch import SynthBatch
from streamaug.stream.footprint import Footprint, footprint, running
from streamaug.stream.hashing import digest_of, pixels_of
from streamaug.stream.rehearsal import CLASSES, IMAGE_SHAPE, ROWS, images_of, make_planner, make_stream
from streamaug.stream.stream import Stream

__all__ = [
    "CLASSES",
    "IMAGE_SHAPE",
    "ROWS",
    "digest_of",
    "images_of",
    "make_planner",
    "make_stream",
    "pixels_of",
    "running",
]

_LATE_SECONDS = 0.25


def listed(stream: Stream, takes: list[int]) -> list[tuple]:
    """What these calls of take deliver, image by image."""
    return [image for n in takes for image in images_of(stream.take(n))]


def undisturbed(takes: list[int], **options: object) -> list[tuple]:
    """What the same stream delivers without a process in between."""
    with make_stream(backend="local", **options) as stream:
        return listed(stream, takes)


class Interrupt(BaseException):
    """What a signal raises in the middle of `take_for`."""


def take_for(stream: Stream, n: int, seconds: float) -> SynthBatch | None:
    """Call take and break it off after so many seconds, if it is still under way: then there is nothing to return."""
    steps = stream._recorder.steps

    def handler(signum: int, frame: object) -> None:
        if stream._recorder.steps > steps:
            return  # as good as done: what it delivers would be lost
        if not stream._in_take.locked():
            signal.setitimer(signal.ITIMER_REAL, 0.005)  # it has not begun
            return
        raise Interrupt

    old = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        return stream.take(n)
    except Interrupt:
        return None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def interrupted_take(stream: Stream, n: int, seconds: float) -> bool:
    """Whether a call of take was still under way after so many seconds, and was broken off."""
    return take_for(stream, n, seconds) is None


# Time, on a machine that may be busy.


def until(condition: Callable[[], bool], seconds: float = 30.0) -> float:
    """Wait for a condition; returns how long it took, fails when it takes too long.

    Of a look that comes late a quarter of a second counts at most: whatever held this process up may have held up all.
    """
    took, last = 0.0, time.monotonic()
    while not condition():
        assert took < seconds, f"still not so after {seconds} s"
        time.sleep(0.005)
        now = time.monotonic()
        took, last = took + min(now - last, _LATE_SECONDS), now
    return took


def assert_within(seconds: float, measure: Callable[[], float]) -> None:
    """What is promised within so many seconds is measured again when it took longer, twice at most: the machine may
    have stood still."""
    took: list[float] = []
    while not took or took[-1] >= seconds:
        assert len(took) < 3, f"not within {seconds} s: {took}"
        took.append(measure())


def at_some_pace(check: Callable[[float], None]) -> None:
    """A check of what follows from who is faster, trainer or producer. Where milliseconds decide, a busy machine does:
    it is made again with all times multiplied, which it is told."""
    for pace in (1, 4):
        with contextlib.suppress(AssertionError):
            return check(pace)
    return check(16)


# What there is.


def producers_of(stream: Stream, count: int = 1) -> list[int]:
    """The processes of all producers, once their numbers are known: one may deliver before that."""
    pids: list[int] = []

    def all_known() -> bool:
        pids[:] = stream.producer_pids
        return len(pids) == count

    until(all_known)
    return pids


def assert_given_back(before: Footprint, seconds: float = 20.0) -> None:
    """Soon this process holds no more than before; less, where what an earlier test left has gone meanwhile."""
    ends = time.monotonic() + seconds
    while beyond := {name: n for name, n in asdict(footprint()).items() if n > getattr(before, name)}:
        assert time.monotonic() < ends, f"{beyond}, but {before} before"
        time.sleep(0.01)


@contextlib.contextmanager
def descriptors_left(spare: int):
    """This process may have so many more, whichever numbers those have that it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = {int(name) for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")}
    limit = 0
    while limit in held or limit - sum(fd < limit for fd in held) < spare:
        limit += 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

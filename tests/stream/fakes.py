"""Small streams without a model, and what tests ask of them."""

import signal
import time
from collections.abc import Callable

from streamaug.stream.footprint import running
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


def listed(stream: Stream, takes: list[int]) -> list[tuple]:
    """What these calls of take deliver, image by image."""
    return [image for n in takes for image in images_of(stream.take(n))]


def undisturbed(takes: list[int], **options: object) -> list[tuple]:
    """What the same stream delivers without a process in between."""
    with make_stream(backend="local", **options) as stream:
        return listed(stream, takes)


class Interrupt(BaseException):
    """What a signal raises in the middle of `interrupted_take`."""


def interrupted_take(stream: Stream, n: int, seconds: float) -> bool:
    """Call take and break it off after so many seconds; returns whether it was still under way."""

    def handler(signum: int, frame: object) -> None:
        raise Interrupt

    old = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        stream.take(n)
        return False
    except Interrupt:
        return True
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def until(condition: Callable[[], bool], seconds: float = 10.0) -> float:
    """Wait for a condition; returns how long it took, fails when it takes too long."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"still not so after {seconds} s"
        time.sleep(0.005)
    return time.monotonic() - began

"""Lets the interpreter exit while background threads of an unstopped graph still read the stream.

A daemon thread that is inside torch when Python finalises takes the whole process down ("terminate called without an
active exception"): torchdata's Prefetcher and ParallelMapper run such threads. So when the interpreter leaves, nodes
give nothing more, and it waits a moment for those threads to come to rest.
"""

import atexit
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

from streamaug.stream import producer

_PATIENCE_SECONDS = 2.0
_leaving = threading.Event()
# Files in which a thread only waits: of a queue or a semaphore, or for producers (`producer.wait`).
_RESTING = {threading.__file__, producer.__file__}


def pause_if_leaving() -> None:
    """Called by a node before it works: holds a daemon thread for good once the interpreter leaves."""
    if _leaving.is_set() and threading.current_thread().daemon:
        threading.Event().wait()


@atexit.register
def _settle() -> None:
    _leaving.set()
    end = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < end and any(_at_work(frame) for frame in _graph_threads()):
        time.sleep(0.005)


def _graph_threads() -> Iterator[FrameType]:
    """The innermost frames of the daemon threads that run torchdata's nodes."""
    frames = sys._current_frames()
    for thread in threading.enumerate():
        frame = frames.get(thread.ident or 0)
        if thread.daemon and frame is not None and any("torchdata" in name for name in _files(frame)):
            yield frame


def _files(frame: FrameType | None) -> Iterator[str]:
    while frame is not None:
        yield frame.f_code.co_filename
        frame = frame.f_back


def _at_work(frame: FrameType) -> bool:
    return frame.f_code.co_filename not in _RESTING

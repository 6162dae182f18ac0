"""A backend whose producers are at the far end of a pipe and share no memory: what one for other machines would do.

`PipeProducer` is the near end, in the trainer. Run as a program, this file is the far end: it reads orders from its
standard input and writes batches to its standard output.
"""

import contextlib
import json
import os
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import asdict

import numpy as np

from streamaug.orders import OrderBatch
from streamaug.stream.producer import build_engine, hint, serve, wait
from streamaug.stream.producers.backends import Lane, Work
from streamaug.stream.ring import FAILED, READY, STAGES, Layout, Mailboxes, Ring, Slot
from streamaug.stream.ring.memory import Memory

FRAME = struct.Struct("<Bqq")  # kind, number, bytes that follow
START, ORDER, JUDGE, SKIP = range(4)  # down
UP, BATCH, BEAT, ERROR = range(4)  # up


def send(to, kind: int, number: int = 0, contents: bytes = b"") -> None:
    to.write(FRAME.pack(kind, number, len(contents)) + contents)
    to.flush()


class Frames:
    """Whole frames out of a descriptor that is read without waiting."""

    def __init__(self, fd: int):
        self._fd = fd
        self._data = b""
        self.ended = False

    def read(self) -> list[tuple[int, int, bytes]]:
        text = os.read(self._fd, 1 << 20)
        self.ended = not text
        self._data += text
        frames = []
        while len(self._data) >= FRAME.size:
            kind, number, nbytes = FRAME.unpack_from(self._data)
            end = FRAME.size + nbytes
            if len(self._data) < end:
                break
            frames.append((kind, number, self._data[FRAME.size : end]))
            self._data = self._data[end:]
        return frames


ARRAYS = ("images", "ids", "labels", "scores", "source", "reasons")


def packed(slot: Slot) -> bytes:
    began, ended = slot.span_ns
    head = np.array([slot.count, slot.abandoned, ended - began, *slot.stage_ns], np.int64)
    return b"".join([head.tobytes(), *(getattr(slot, name).tobytes() for name in ARRAYS)])


def unpack(data: bytes, slot: Slot) -> None:
    """Into the trainer's slot, with times by this machine's clock."""
    count, abandoned, took_ns, *stage_ns = np.frombuffer(data, np.int64, 3 + len(STAGES)).tolist()
    at = 8 * (3 + len(STAGES))
    for name in ARRAYS:
        array = getattr(slot, name)
        array[:] = np.frombuffer(data, array.dtype, array.size, at).reshape(array.shape)
        at += array.nbytes
    now = time.monotonic_ns()
    slot.finish(count, abandoned=bool(abandoned), began_ns=now - took_ns, ended_ns=now, stage_ns=stage_ns)


# The near end.


class PipeProducer:
    """Implements `backends.Producer`."""

    can_restart = True

    def __init__(self, lane: Lane, work: Work):
        self._lane = lane
        self._work = work
        self._process: subprocess.Popen | None = None
        self.thread: threading.Thread | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    @property
    def watch_fds(self) -> list[int]:
        return []

    def start(self, incarnation: int) -> None:
        path = [path or os.getcwd() for path in sys.path]
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
        )
        work = {"engine": self._work.engine, "options": self._work.options}
        shape = {"layout": asdict(self._lane.layout), "mailboxes": self._lane.mailboxes_shape}
        with contextlib.suppress(BrokenPipeError):  # its death is noticed elsewhere
            send(self._process.stdin, START, contents=json.dumps(work | shape).encode())
        self.thread = threading.Thread(target=self._relay, args=(self._process,), daemon=True)
        self.thread.start()

    def alive(self) -> bool:
        if self.thread is not None and self.thread.is_alive():
            return True
        if self._process is not None:
            self.kill()
            self._process.wait()
            with contextlib.suppress(BrokenPipeError):  # what was still to be sent to it
                self._process.stdin.close()
            self._process.stdout.close()
            self._process = None
        return False

    def look(self) -> None:
        pass

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def stop(self) -> None:
        if self.thread is not None:
            self.thread.join(timeout=10)
        self.alive()

    def last_words(self) -> str:
        return "the pipe was closed"

    def _relay(self, process: subprocess.Popen) -> None:
        """Stand in for the producer at the ring until it closes or the far end is gone."""
        ring = Ring(self._lane.memory, self._lane.layout)
        first = sent = skipped = ring.published  # the far end counts from 0
        posted = -1
        frames = Frames(process.stdout.fileno())
        poll = select.poll()
        for fd in (process.stdout.fileno(), self._lane.wake_producer.fileno()):
            poll.register(fd, select.POLLIN)
        try:
            while not ring.closing and not frames.ended:
                while sent < ring.issued:
                    slot = ring.slot(sent)
                    if self._lane.mailboxes is not None and slot.judge_post > posted:
                        posted = slot.judge_post
                        state = self._lane.mailboxes.read(posted)
                        if state is not None:  # else nobody wants the order any more
                            send(process.stdin, JUDGE, posted, state.tobytes())
                    order = bytearray(OrderBatch.nbytes(self._lane.layout.batch_size))
                    slot.order.write(memoryview(order))
                    send(process.stdin, ORDER, slot.judge_post, bytes(order))
                    sent += 1
                if ring.skipping_to > skipped:
                    skipped = ring.skipping_to
                    send(process.stdin, SKIP, skipped - first)
                ready = dict(poll.poll(250))
                if self._lane.wake_producer.fileno() in ready:
                    wait([self._lane.wake_producer], 0)
                if process.stdout.fileno() in ready:
                    for frame in frames.read():
                        self._hear(ring, *frame)
        except BrokenPipeError:
            pass

    def _hear(self, ring: Ring, kind: int, number: int, contents: bytes) -> None:
        now = time.monotonic_ns()
        if kind == UP:
            ring.ready(now)
        elif kind == BATCH:
            unpack(contents, ring.slot(ring.published))
            ring.publish(ring.published)
        elif kind == ERROR:
            report = json.loads(contents)
            ring.fail(report["type"], report["message"], report["traceback"], report["k"])
        ring.beat(now)
        hint(self._lane.wake_producer)


# The far end.


def main() -> None:
    spec = json.loads(next_frame_of(sys.stdin.buffer)[2])
    layout = Layout(**spec["layout"])
    memory = Memory(layout.nbytes, None)
    ring, near = Ring(memory, layout), None
    if spec["mailboxes"] is not None:
        near = Mailboxes(Memory(Mailboxes.nbytes(*spec["mailboxes"]), None), *spec["mailboxes"])
        near.clear()
    ours, theirs = socket.socketpair()
    threading.Thread(
        target=serve,
        args=(Ring(memory, layout), near, theirs, lambda: build_engine(spec["engine"], spec["options"])),
        daemon=True,
    ).start()
    relay(ring, near, ours, Frames(sys.stdin.fileno()), sys.stdout.buffer)


def relay(ring: Ring, mailboxes: Mailboxes | None, wake: socket.socket, frames: Frames, up) -> None:
    sent, beat, said = 0, 0, False
    named: deque[int] = deque(maxlen=ring.layout.slots)  # the posts of the orders there may still be
    poll = select.poll()
    for fd in (sys.stdin.fileno(), wake.fileno()):
        poll.register(fd, select.POLLIN)
    while not frames.ended:
        ready = dict(poll.poll(50))
        if wake.fileno() in ready:
            wait([wake], 0)
        for kind, number, contents in frames.read() if sys.stdin.fileno() in ready else []:
            if kind == ORDER:
                named.append(number)
                ring.issue(OrderBatch.read(memoryview(contents), ring.layout.batch_size), number)
            elif kind == JUDGE:
                mailboxes.write(number, np.frombuffer(contents, np.uint8), keep=set(named))
            else:
                ring.skip_to(number)
            hint(wake)
        if ring.state == READY and not said:
            send(up, UP)
            said = True
        while sent < ring.published:
            send(up, BATCH, sent, packed(ring.slot(sent)))
            sent += 1
        if ring.last_beat_ns > beat:
            beat = ring.last_beat_ns
            send(up, BEAT)
        if ring.state == FAILED:
            send(up, ERROR, contents=json.dumps(ring.error()).encode())
            return


def next_frame_of(stream) -> tuple[int, int, bytes]:
    """The first one: what follows stays in the descriptor, which `Frames` reads."""
    kind, number, nbytes = FRAME.unpack(stream.raw.read(FRAME.size))
    return kind, number, stream.raw.read(nbytes)


if __name__ == "__main__":
    main()

"""The producer: takes orders from its ring, runs the engine on them and publishes what it made.

`serve` is the loop, the same in a thread and in a process of its own. `python -m streamaug.stream.producer`
is that process: it reads what to run as JSON from its standard input. Several rings are served in `producers.host`.
"""

import contextlib
import ctypes
import importlib
import itertools
import json
import logging
import os
import random
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from streamaug.orders import REASONS, OrderBatch
from streamaug.stream import faults
from streamaug.stream.engine import Abandoned, Engine
from streamaug.stream.faults import fault
from streamaug.stream.ring import STAGES, Layout, Mailboxes, Ring, cuda
from streamaug.stream.ring.emission import Emission
from streamaug.stream.ring.memory import Memory
from streamaug.stream.ring.pixels import Images, attach

IDLE_SECONDS = 0.25  # what a lost wake-up costs at most
LOG_FORMAT = "%(levelname)s %(name)s: %(message)s"  # the trainer logs such lines again, at their level
_POLL_SECONDS = 50e-6
_LOOK_SECONDS = 0.2  # how often a producer looks whether its trainer is still there


def serve(ring: Ring, mailboxes: Mailboxes | None, wake: socket.socket, build: Callable[[], Engine]) -> None:
    """Build the engine and make orders until the trainer closes the ring. An exception is left in the
    ring."""
    end = End(ring, mailboxes, wake)
    try:
        maker = Maker(build())
        maker.admit(end)
        while not ring.closing:
            if end.has_order:
                maker.make(end)
            else:
                end.beat()
                wait([wake], IDLE_SECONDS)
    except BaseException as error:
        if not ring.closing:
            end.fail(Failure.of(error, end.k))


@dataclass(frozen=True)
class Failure:
    """An exception, as it is left in a ring."""

    type: str
    message: str
    traceback: str
    k: int | None  # the batch that was in work

    @classmethod
    def of(cls, error: BaseException, k: int | None) -> "Failure":
        return cls(type(error).__name__, str(error), "".join(traceback.format_exception(error)), k)


class End:
    """The producer's end of one ring."""

    _serials = itertools.count()

    def __init__(self, ring: Ring, mailboxes: Mailboxes | None, wake: socket.socket):
        self.ring = ring
        self.mailboxes = mailboxes
        self.wake = wake
        self.number = ring.published  # of the order that is made next
        self.k: int | None = None  # the batch in work
        self.deserted = False  # the trainer is gone
        self.serial = next(self._serials)

    @property
    def has_order(self) -> bool:
        return self.ring.issued > self.number and not self.ring.closing

    @property
    def is_unwanted(self) -> bool:
        """Whether nobody waits for the order that is made next."""
        return self.deserted or self.ring.closing or self.number < self.ring.skipping_to

    def beat(self) -> None:
        self.ring.beat(time.monotonic_ns())

    def fail(self, failure: Failure) -> None:
        self.ring.fail(failure.type, failure.message, failure.traceback, failure.k)
        hint(self.wake)


class Maker:
    """Makes orders with one engine, those of one ring or of several."""

    def __init__(self, engine: Engine, alongside: Callable[[], None] | None = None):
        """alongside: called whenever the engine says that work on a batch goes on."""
        self._engine = engine
        self._alongside = alongside
        self._judge: tuple[int, int] | None = None  # the engine's: of which end, and its post there

    def admit(self, end: End) -> None:
        """Say that its orders are made from now on. Raises ValueError when the engine makes no images for this ring."""
        given, needed = tuple(self._engine.image_shape), tuple(end.ring.layout.image_shape)
        if given != needed:
            raise ValueError(f"the engine makes images of shape {given}, the ring was laid out for {needed}")
        faults.at(end.number)
        fault("before_ready")
        end.ring.ready(time.monotonic_ns())
        hint(end.wake)

    def make(self, end: End) -> None:
        """Make the next order and publish what came of it."""
        engine = self._engine
        faults.at(end.number)
        fault("before_order")
        slot = end.ring.slot(end.number)
        began = time.monotonic_ns()
        before = dict(engine.stage_seconds)
        count, abandoned = 0, False
        slot.reasons[:] = 0
        slot.on_beat(partial(self._beat, end))
        try:
            self._beat(end)
            order = slot.order
            end.k = order.k
            self._load_judge(end, order.judge_version, slot.judge_post)
            made = engine.make(order, slot)
            count = self._arrived(made, end) if isinstance(made, Emission) else made
            _check(count, slot.reasons, order)
        except Abandoned:
            count, abandoned = 0, True
        finally:
            slot.on_beat(None)
        fault("after_make")
        spent = [int((engine.stage_seconds.get(name, 0.0) - before.get(name, 0.0)) * 1e9) for name in STAGES]
        slot.finish(count, abandoned=abandoned, began_ns=began, ended_ns=time.monotonic_ns(), stage_ns=spent)
        fault("before_publish")
        end.ring.publish(end.number)
        fault("after_publish")
        hint(end.wake)
        end.number += 1
        end.k = None

    def _arrived(self, emission: Emission, end: End) -> int:
        """Polled: waiting on the device would keep its host from everything else."""
        while not emission.done():
            try:
                self._beat(end)
            except Abandoned:
                if not end.deserted:
                    raise
                # Its memory is given back next, to which the device still writes.
            time.sleep(_POLL_SECONDS)
        if end.deserted:
            raise Abandoned
        return emission.complete()

    def _beat(self, end: End) -> None:
        end.beat()
        if self._alongside is not None:
            self._alongside()
        if end.is_unwanted:
            raise Abandoned

    def _load_judge(self, end: End, version: int, post: int) -> None:
        """Use exactly the state that the order names: never an older one, never a newer one, never another rank's."""
        if end.mailboxes is None or (end.serial, post) == self._judge:
            return
        state = end.mailboxes.read(post)
        if state is None:
            self._beat(end)  # it was overwritten because nobody wants the batch any more
            raise RuntimeError(f"version {version} of the judge is not in the mailboxes")
        self._engine.load_judge(version, state)
        self._judge = end.serial, post


def _check(count: int, reasons: np.ndarray, order: OrderBatch) -> None:
    if reasons.max() >= len(REASONS):
        raise ValueError(f"batch {order.k}: reason {reasons.max()} is not an index into {REASONS}")
    rejected = int(np.count_nonzero(reasons))
    if count + rejected != len(order):
        raise ValueError(
            f"batch {order.k}: of {len(order)} orders the engine accepted {count} and gave {rejected} a "
            "reason for rejection; every order is one or the other"
        )


def hint(wake: socket.socket) -> None:
    """Wake whoever waits on the other end. May be lost: the sequence numbers are the truth."""
    with contextlib.suppress(OSError):
        wake.send(b"!", socket.MSG_DONTWAIT)


def wait(wakes: list[socket.socket], seconds: float) -> None:
    """Sleep until a hint arrives on any of the sockets, or for `seconds`."""
    poll = select.poll()
    by_fd = {wake.fileno(): wake for wake in wakes}
    for fd in by_fd:
        poll.register(fd, select.POLLIN)
    for fd, _ in poll.poll(seconds * 1000):
        with contextlib.suppress(BlockingIOError, ConnectionError):
            by_fd[fd].recv(4096, socket.MSG_DONTWAIT)


def behind_the_trainer(device: str) -> contextlib.AbstractContextManager[None]:
    """On a GPU, a stream of the least priority."""
    if device == "cpu":
        return contextlib.nullcontext()
    gpus = cuda.connect()
    return gpus.stream(gpus.index(device), foreground=False)


def build_engine(engine: str, options: dict, prepare: Callable[[], None] | None = None) -> Engine:
    """Import "module:function" and call it with the options; `prepare` runs before it is called and after."""
    module_name, _, function = engine.partition(":")
    build = getattr(importlib.import_module(module_name), function)
    if prepare is None:
        return build(options)
    prepare()
    built = build(options)
    prepare()  # for what building imported
    return built


def main() -> None:
    """The producer as a process of its own, a child of the trainer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    spec: dict[str, Any] = json.load(sys.stdin)
    run(spec, parent=spec["trainer_pid"])


def run(spec: dict[str, Any], parent: int) -> NoReturn:
    """Serve, and end the process. The death of the trainer, or of `parent`, ends it whatever it is doing.

    spec: what `backends.ProcessProducer` wrote; its "fds" are descriptors of this process.
    """
    wake = socket.socket(fileno=spec["fds"]["wake"])
    enter(spec, parent, wake)
    mapped = Mapped(spec)
    with contextlib.ExitStack() as ends:

        def build() -> Engine:
            images = mapped.place(spec)
            if images is not None:
                ends.callback(images.close)
            ends.enter_context(behind_the_trainer(spec["device"]))
            return build_as_told(spec)

        serve(mapped.ring, mapped.mailboxes, wake, build)
    leave()


def enter(spec: dict[str, Any], parent: int, wake: socket.socket | None) -> None:
    """Make this process a producer's; `wake`: whose other end is the trainer's."""
    logging.basicConfig(format=LOG_FORMAT, level=logging.INFO)
    die_with(parent)
    threading.Thread(target=_look_after, args=(parent, wake), name="streamaug-lifeline", daemon=True).start()
    if spec["nice"]:
        _give_way(spec["nice"])
    sys.path[:] = spec["sys_path"]
    faults.arm(spec["fault"])
    cuda.PROVIDER = spec["cuda"]


def leave() -> NoReturn:
    """End this process."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # nothing is left to clean up, and tearing an interpreter with torch down takes a second


class Mapped:
    """The memory of a ring and of its mailboxes, as `backends.Lane` describes them and passes their descriptors."""

    def __init__(self, spec: dict[str, Any]):
        self.layout = Layout(**spec["layout"])
        self.memory = Memory.attach(spec["fds"]["ring"], self.layout.nbytes)
        self.ring = Ring(self.memory, self.layout)
        self.mailboxes: Mailboxes | None = None
        self._posts: Memory | None = None
        if spec["mailboxes"] is not None:
            count, nbytes = spec["mailboxes"]
            self._posts = Memory.attach(spec["fds"]["mailboxes"], Mailboxes.nbytes(count, nbytes))
            self.mailboxes = Mailboxes(self._posts, count, nbytes)

    def place(self, spec: dict[str, Any]) -> Images | None:
        """Find the images where they are not simply in the ring's block; whoever calls closes them."""
        images = attach(spec["images"], self.memory, self.layout.images_shape, spec["device"])
        self.ring.place(images)
        return images

    def close(self) -> None:
        """Give it back, once nothing looks into it any more."""
        self.memory.close()
        if self._posts is not None:
            self._posts.close()


def build_as_told(spec: dict[str, Any]) -> Engine:
    """The engine, with the seeds and the threads that the trainer fixed."""
    return build_engine(spec["engine"], spec["options"], partial(_seed, spec["seed"], spec["threads"]))


def die_with(parent: int) -> None:
    """Let the kernel end this process when its parent ends, where it can. Starts no thread."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it had ended before
        os._exit(1)


def _look_after(parent: int, wake: socket.socket | None) -> None:
    """End this process when its parent has ended or the trainer's end of the socket is closed."""
    poll = select.poll()
    if wake is not None:
        poll.register(wake, getattr(select, "POLLRDHUP", 0))
    while os.getppid() == parent and not poll.poll(_LOOK_SECONDS * 1000):
        pass
    os._exit(1)


def _give_way(nice: int) -> None:
    """Lower this process's priority, and its session's: Linux shares a core among sessions before it looks at the
    processes in each (sched_autogroup), and a producer has a session of its own."""
    os.nice(nice)
    for _ in range(10):
        try:
            Path("/proc/self/autogroup").write_text(str(nice))
            return
        except BlockingIOError:  # the system allows one change in a tenth of a second, whoever makes it
            time.sleep(0.1)
        except OSError:  # no such groups here
            return


def _seed(seed: int, threads: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(seed)
        torch.set_num_threads(threads)


if __name__ == "__main__":
    main()

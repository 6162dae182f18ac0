"""The producer: takes orders from its ring, runs the engine on them and publishes what it made.

`serve` is the loop, the same in a thread and in a process of its own. `python -m streamaug.stream.producer`
is that process: it reads what to run as JSON from its standard input.
"""

import contextlib
import ctypes
import importlib
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
from streamaug.stream.ring.pixels import attach

IDLE_SECONDS = 0.25  # what a lost wake-up costs at most
LOG_FORMAT = "%(levelname)s %(name)s: %(message)s"  # the trainer logs such lines again, at their level
_POLL_SECONDS = 50e-6
_LOOK_SECONDS = 0.2  # how often a producer looks whether its trainer is still there


def serve(ring: Ring, mailboxes: Mailboxes | None, wake: socket.socket, build: Callable[[], Engine]) -> None:
    """Build the engine and make orders until the trainer closes the ring. An exception is left in the
    ring."""
    loop = _Loop(ring, mailboxes, wake)
    try:
        loop.run(build())
    except BaseException as error:
        if ring.closing:
            return
        ring.fail(type(error).__name__, str(error), traceback.format_exc(), loop.k)
        hint(wake)


class _Loop:
    def __init__(self, ring: Ring, mailboxes: Mailboxes | None, wake: socket.socket):
        self.ring = ring
        self.mailboxes = mailboxes
        self.wake = wake
        self.k: int | None = None  # the batch in work, for the error report
        self._number = ring.published
        self._judge_post: int | None = None

    def run(self, engine: Engine) -> None:
        given, needed = tuple(engine.image_shape), tuple(self.ring.layout.image_shape)
        if given != needed:
            raise ValueError(f"the engine makes images of shape {given}, the ring was laid out for {needed}")
        faults.at(self._number)
        fault("before_ready")
        self.ring.ready(time.monotonic_ns())
        hint(self.wake)
        while self._order_there():
            self._make(engine)

    def _order_there(self) -> bool:
        """Wait for the next order; False when the ring closes."""
        while not self.ring.closing:
            if self.ring.issued > self._number:
                return True
            self.ring.beat(time.monotonic_ns())
            wait([self.wake], IDLE_SECONDS)
        return False

    def _make(self, engine: Engine) -> None:
        faults.at(self._number)
        fault("before_order")
        slot = self.ring.slot(self._number)
        began = time.monotonic_ns()
        before = dict(engine.stage_seconds)
        count, abandoned = 0, False
        slot.reasons[:] = 0
        slot.on_beat(self._beat)
        try:
            self._beat()
            order = slot.order
            self.k = order.k
            self._load_judge(engine, order.judge_version, slot.judge_post)
            made = engine.make(order, slot)
            count = self._arrived(made) if isinstance(made, Emission) else made
            _check(count, slot.reasons, order)
        except Abandoned:
            count, abandoned = 0, True
        finally:
            slot.on_beat(None)
        fault("after_make")
        spent = [int((engine.stage_seconds.get(name, 0.0) - before.get(name, 0.0)) * 1e9) for name in STAGES]
        slot.finish(count, abandoned=abandoned, began_ns=began, ended_ns=time.monotonic_ns(), stage_ns=spent)
        fault("before_publish")
        self.ring.publish(self._number)
        fault("after_publish")
        hint(self.wake)
        self._number += 1
        self.k = None

    def _arrived(self, emission: Emission) -> int:
        """Polled: waiting on the device would keep its host from everything else."""
        while not emission.done():
            self._beat()
            time.sleep(_POLL_SECONDS)
        return emission.complete()

    def _beat(self) -> None:
        self.ring.beat(time.monotonic_ns())
        if self.ring.closing or self._number < self.ring.skipping_to:
            raise Abandoned

    def _load_judge(self, engine: Engine, version: int, post: int) -> None:
        """Use exactly the state that the order names: never an older one, never a newer one."""
        if self.mailboxes is None or post == self._judge_post:
            return
        state = self.mailboxes.read(post)
        if state is None:
            self._beat()  # it was overwritten because nobody wants the batch any more
            raise RuntimeError(f"version {version} of the judge is not in the mailboxes")
        engine.load_judge(version, state)
        self._judge_post = post


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
    logging.basicConfig(format=LOG_FORMAT, level=logging.INFO)
    wake = socket.socket(fileno=spec["fds"]["wake"])
    die_with(parent)
    threading.Thread(target=_look_after, args=(parent, wake), name="streamaug-lifeline", daemon=True).start()
    if spec["nice"]:
        _give_way(spec["nice"])
    sys.path[:] = spec["sys_path"]
    faults.arm(spec["fault"])
    cuda.PROVIDER = spec["cuda"]
    layout = Layout(**spec["layout"])
    block = Memory.attach(spec["fds"]["ring"], layout.nbytes)
    ring = Ring(block, layout)
    mailboxes = None
    if spec["mailboxes"] is not None:
        count, nbytes = spec["mailboxes"]
        memory = Memory.attach(spec["fds"]["mailboxes"], Mailboxes.nbytes(count, nbytes))
        mailboxes = Mailboxes(memory, count, nbytes)

    def prepare() -> None:
        _seed(spec["seed"], spec["threads"])

    with contextlib.ExitStack() as ends:

        def build() -> Engine:
            images = attach(spec["images"], block, layout.images_shape, spec["device"])
            if images is not None:
                ends.callback(images.close)
                ring.place(images)
            ends.enter_context(behind_the_trainer(spec["device"]))
            return build_engine(spec["engine"], spec["options"], prepare)

        serve(ring, mailboxes, wake, build)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # nothing is left to clean up, and tearing an interpreter with torch down takes a second


def die_with(parent: int) -> None:
    """Let the kernel end this process when its parent ends, where it can. Starts no thread."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it had ended before
        os._exit(1)


def _look_after(parent: int, wake: socket.socket) -> None:
    """End this process when its parent has ended or the trainer's end of the socket is closed."""
    poll = select.poll()
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

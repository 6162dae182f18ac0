"""Engines without a model: an image is a hash of its order, by which it can be recognised."""

import hashlib
import itertools
import logging
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

from streamaug.errors import ModelError
from streamaug.orders import OrderBatch
from streamaug.stream.engine import Engine
from streamaug.stream.faults import fault
from streamaug.stream.ring import STAGES, Slot


class HashEngine:
    """Pixels are noise seeded by the order and the judge. Options:

    image_shape; seconds: time a batch takes; slow_every, slow_seconds: every so many batches one takes this much
    longer; beat: whether it beats meanwhile; start_seconds: time building takes; reject: share of the images that
    is rejected; reject_label: a class that is rejected altogether; raise_at, allocate_at, exit_at, stop_at: the
    batch k at which to raise, to ask for more memory than there is, to exit, or to be stopped; once: a file whose
    existence says that raising or stopping was done (needed for stop_at); die_at_start, refuse: exit, or raise a
    ModelError, while building; say: log this; miscount: return one too many; wild_clock: let the process's wall
    clock jump by days; unfaithful: images depend on the process.
    """

    def __init__(self, options: dict):
        self.options = options
        self.image_shape = tuple(options["image_shape"])
        self.stage_seconds = dict.fromkeys(STAGES, 0.0)
        self.judge = str(os.getpid()).encode() if options.get("unfaithful") else b""
        self.judge_version: int | None = None
        if options.get("wild_clock"):
            time.time = wild_clock()
        time.sleep(options.get("start_seconds", 0))
        if options.get("die_at_start"):
            self._exit()
        if "refuse" in options:
            raise ModelError(options["refuse"])
        if "say" in options:
            logging.getLogger("streamaug.sampling").warning(options["say"])

    def load_judge(self, version: int, state: np.ndarray) -> None:
        self.judge = state.tobytes()
        self.judge_version = version

    def make(self, order: OrderBatch, slot: Slot) -> int:
        if self.judge_version not in (None, order.judge_version):
            raise AssertionError(f"batch {order.k} names judge {order.judge_version}, not {self.judge_version}")
        self._misbehave(order.k)
        self._take_time(order.k, slot)
        accepted = 0
        for position, image in enumerate(order.images):
            if position == len(order) // 2:
                fault("mid_write")
            digest = digest_of(image, order.start, self.judge)
            if self._rejects(digest, image):
                slot.reasons[position] = 1 + digest[1] % 2
                continue
            slot.images[accepted] = pixels_of(digest, self.image_shape)
            slot.ids[accepted] = image["id"]
            slot.labels[accepted] = image["label"]
            slot.scores[accepted] = digest[2] / 255
            slot.source[accepted] = position
            accepted += 1
        return accepted + bool(self.options.get("miscount"))

    def _rejects(self, digest: bytes, image: np.void) -> bool:
        return digest[0] < 256 * self.options.get("reject", 0) or image["label"] == self.options.get("reject_label", -1)

    def _misbehave(self, k: int) -> None:
        if k == self.options.get("raise_at") and self._first_time():
            raise RuntimeError("the weights are rotten")
        if k == self.options.get("allocate_at"):
            np.ones(1 << 60, np.uint8)
        if k == self.options.get("exit_at"):
            self._exit()
        if k == self.options.get("stop_at") and self._first_time():
            os.kill(os.getpid(), signal.SIGSTOP)

    def _first_time(self) -> bool:
        once = self.options.get("once")
        if once is None or not Path(once).exists():
            if once is not None:
                Path(once).touch()
            return True
        return False

    def _exit(self) -> None:
        print("what I last wanted to say", file=sys.stderr, flush=True)
        os._exit(3)

    def _take_time(self, k: int, slot: Slot) -> None:
        seconds = self.options.get("seconds", 0)
        if "slow_every" in self.options and k % self.options["slow_every"] == 0:
            seconds += self.options["slow_seconds"]
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.01))
            if self.options.get("beat", True):
                slot.beat()
        self.stage_seconds["sample"] += seconds


class FillEngine:
    """Does next to nothing: fills each batch with its number modulo 251 and accepts everything."""

    def __init__(self, options: dict):
        self.image_shape = tuple(options["image_shape"])
        self.stage_seconds = dict.fromkeys(STAGES, 0.0)

    def load_judge(self, version: int, state: np.ndarray) -> None:
        pass

    def make(self, order: OrderBatch, slot: Slot) -> int:
        slot.images[:] = order.k % 251
        slot.ids[:] = order.images["id"]
        slot.labels[:] = order.images["label"]
        slot.source[:] = np.arange(len(order))
        slot.scores[:] = 1.0
        return len(order)


def digest_of(image: np.void, start: int, judge: bytes) -> bytes:
    key = [int(image[name]) for name in ("id", "label", "row_a", "row_b")]
    return hashlib.sha256(repr([*key, start]).encode() + judge).digest()


def pixels_of(digest: bytes, image_shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(hashlib.shake_128(digest).digest(int(np.prod(image_shape))), np.uint8).reshape(image_shape)


def wild_clock():
    """A `time.time` that jumps by days, forwards and backwards, from call to call."""
    steps = itertools.cycle([0.0, 5e5, -8e5, 3e7, -1e9])
    return lambda: 1.7e9 + next(steps)


def build(options: dict) -> Engine:
    return HashEngine(options)


def build_fill(options: dict) -> Engine:
    return FillEngine(options)

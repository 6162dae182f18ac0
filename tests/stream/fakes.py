"""Streams whose engine has no model: an image is a hash of its order, by which it can be recognised."""

import contextlib
import hashlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from streamaug.config import Recipe, StreamConfig
from streamaug.errors import ModelError
from streamaug.orders import OrderBatch, Planner, Schedule
from streamaug.stream.engine import Engine
from streamaug.stream.faults import fault
from streamaug.stream.ring import Slot
from streamaug.stream.stream import Stream

IMAGE_SHAPE = (1, 8, 8)
CLASSES = 4
ROWS = 12


class HashEngine:
    """Pixels are noise seeded by the order and the judge. Options:

    image_shape; seconds: time a batch takes; beat: whether it beats meanwhile; start_seconds: time building
    takes; reject: share of the images that is rejected; reject_label: a class that is rejected altogether;
    raise_at, exit_at, stop_at: the batch k at which to raise, to exit, or to be stopped (once: the file
    `stopped` remembers); die_at_start, refuse: exit, or raise a ModelError, while building; say: log this;
    miscount: return one too many.
    """

    def __init__(self, options: dict):
        self.options = options
        self.image_shape = tuple(options["image_shape"])
        self.stage_seconds = dict.fromkeys(("perturb", "sample", "decode", "judge", "emit"), 0.0)
        self.judge = b""
        self.judge_version = -1
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
        assert not self.judge or self.judge_version == order.judge_version
        self._misbehave(order.k)
        self._take_time(slot)
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
        if k == self.options.get("raise_at"):
            raise RuntimeError("the weights are rotten")
        if k == self.options.get("exit_at"):
            self._exit()
        if k == self.options.get("stop_at") and not Path(self.options["stopped"]).exists():
            Path(self.options["stopped"]).touch()
            os.kill(os.getpid(), signal.SIGSTOP)

    def _exit(self) -> None:
        print("what I last wanted to say", file=sys.stderr, flush=True)
        os._exit(3)

    def _take_time(self, slot: Slot) -> None:
        end = time.monotonic() + self.options.get("seconds", 0)
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.01))
            if self.options.get("beat", True):
                slot.beat()
        self.stage_seconds["sample"] += self.options.get("seconds", 0)


def digest_of(image: np.void, start: int, judge: bytes) -> bytes:
    key = [int(image[name]) for name in ("id", "label", "row_a", "row_b")]
    return hashlib.sha256(repr([*key, start]).encode() + judge).digest()


def pixels_of(digest: bytes, image_shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(hashlib.shake_128(digest).digest(int(np.prod(image_shape))), np.uint8).reshape(image_shape)


def build(options: dict) -> Engine:
    return HashEngine(options)


def make_planner(batch_size: int, seed: int = 0) -> Planner:
    schedule = Schedule(np.linspace(0, 1, 11), np.linspace(1, 0, 11))
    return Planner(np.arange(ROWS) % CLASSES, CLASSES, schedule, [Recipe(kind="noise")], batch_size, seed)


def make_stream(
    *,
    judge: np.ndarray | None = None,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    plan_extra: dict | None = None,
    engine_options: dict | None = None,
    **config: object,
) -> Stream:
    """A small stream; `config` are fields of StreamConfig, `engine_options` those of HashEngine."""
    config = {"batch_size": 8, "in_flight": 4} | config
    return Stream(
        make_planner(config["batch_size"], seed),
        engine=f"{__name__}:build",
        engine_options={"image_shape": list(IMAGE_SHAPE)} | (engine_options or {}),
        image_shape=IMAGE_SHAPE,
        config=StreamConfig(**config),
        judge_state=judge,
        rank=rank,
        world_size=world_size,
        plan_extra=plan_extra,
    )


def listed(stream: Stream, takes: list[int]) -> list[tuple]:
    """What these calls of take deliver, image by image."""
    return [image for n in takes for image in images_of(stream.take(n))]


def images_of(batch) -> list[tuple]:
    return [
        (
            int(batch.ids[i]),
            int(batch.labels[i]),
            int(batch.rows[i]),
            int(batch.starts[i]),
            float(batch.scores[i]),
            batch.images[i].tobytes(),
        )
        for i in range(len(batch))
    ]


def undisturbed(takes: list[int], **options: object) -> list[tuple]:
    """What the same stream delivers without a process in between."""
    with make_stream(backend="local", **options) as stream:
        return listed(stream, takes)


def until(condition: Callable[[], bool], seconds: float = 10.0) -> float:
    """Wait for a condition; returns how long it took, fails when it takes too long."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"still not so after {seconds} s"
        time.sleep(0.005)
    return time.monotonic() - began


def running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False

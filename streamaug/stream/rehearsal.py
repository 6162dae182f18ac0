"""Streams whose engine has no model (`hashing`), to rehearse faults with."""

import numpy as np

from streamaug.config import Recipe, StreamConfig
from streamaug.orders import OrderBatch, Planner, Schedule
from streamaug.stream import hashing
from streamaug.stream.batch import SynthBatch
from streamaug.stream.hashing import build as build
from streamaug.stream.hashing import pixels_of as pixels_of
from streamaug.stream.ring import Slot
from streamaug.stream.stream import Stream

IMAGE_SHAPE = (1, 8, 8)
CLASSES = 4
ROWS = 12

Image = tuple[int, int, int, int, float, bytes]  # id, label, row, start, score, pixels


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
    engine: str = f"{hashing.__name__}:build",
    engine_options: dict | None = None,
    **config: object,
) -> Stream:
    """A small stream; `config` are fields of StreamConfig, `engine_options` those of HashEngine."""
    settings = StreamConfig.model_validate({"batch_size": 8, "in_flight": 4} | config)
    return Stream(
        make_planner(settings.batch_size, seed),
        engine=engine,
        engine_options={"image_shape": list(IMAGE_SHAPE)} | (engine_options or {}),
        image_shape=IMAGE_SHAPE,
        config=settings,
        judge_state=judge,
        rank=rank,
        world_size=world_size,
        plan_extra=plan_extra,
    )


def images_of(batch: SynthBatch) -> list[Image]:
    """The images of a batch, each with what identifies it."""
    return [
        (
            int(batch.ids[i]),
            int(batch.labels[i]),
            int(batch.rows[i]),
            int(batch.starts[i]),
            float(batch.scores[i]),
            np.asarray(batch.images[i]).tobytes(),
        )
        for i in range(len(batch))
    ]


class NestedEngine(hashing.HashEngine):
    """Takes as many images as it makes from a stream of its own, whose producer is another process."""

    def __init__(self, options: dict):
        super().__init__(options)
        self._stream = make_stream()

    def make(self, order: OrderBatch, slot: Slot) -> int:
        self._stream.take(len(order))
        return super().make(order, slot)


def build_nested(options: dict) -> NestedEngine:
    return NestedEngine(options)

"""What a producer's niceness and threads do to a trainer on the same cores: the measurement behind the defaults.

Streams of every niceness and number of threads stand side by side; a trainer of one thread and of two takes a batch and
computes a step, with each of them in turn. A batch is as much work as a step, or a quarter of it.
"""

import itertools
import statistics
import time

import numpy as np
import pytest
import torch

from streamaug.config import Recipe, StreamConfig
from streamaug.orders import OrderBatch, Planner, Schedule
from streamaug.stream import Stream

NICE, THREADS, TRAINER_THREADS = (0, 5, 10, 19), (1, 2), (1, 2)
BATCH, IMAGE_SHAPE, SIDE, PRODUCTS = 8, (1, 8, 8), 384, 8
WORK = (1.0, 0.25)  # of a batch, in steps
ROUNDS, STEPS = 5, 8


def compute(work: float = 1.0) -> None:
    """The arithmetic of a small network, as many threads as torch has."""
    x = torch.full((SIDE, SIDE), 1e-3)
    for _ in range(int(work * PRODUCTS)):
        x = x @ x


class Engine:
    image_shape = IMAGE_SHAPE

    def __init__(self, work: float):
        self.work = work
        self.stage_seconds: dict[str, float] = {}

    def make(self, order: OrderBatch, slot) -> int:
        compute(self.work)
        slot.images[:] = 0
        slot.ids[:] = order.images["id"]
        slot.labels[:] = order.images["label"]
        slot.source[:] = np.arange(len(order))
        return len(order)


def build(options: dict) -> Engine:
    return Engine(options["work"])


def make_stream(nice: int, threads: int, work: float) -> Stream:
    schedule = Schedule(np.linspace(0, 1, 11), np.linspace(1, 0, 11))
    stream = Stream(
        Planner(np.arange(30) % 10, 10, schedule, [Recipe(kind="noise")], BATCH, seed=0),
        engine=f"{__name__}:build",
        engine_options={"work": work},
        image_shape=IMAGE_SHAPE,
        config=StreamConfig(batch_size=BATCH, nice=nice, threads=threads),
    )
    stream.take(1)
    return stream


def steps_with(stream: Stream | None) -> tuple[float, float]:
    """Seconds a step takes, and its computing alone; at the beginning there is nothing in the ring."""
    if stream is not None:
        stream.take(4 * BATCH)
    computing, began = 0.0, time.perf_counter()
    for _ in range(STEPS):
        if stream is not None:
            stream.take(BATCH)
        start = time.perf_counter()
        compute()
        computing += time.perf_counter() - start
    return (time.perf_counter() - began) / STEPS, computing / STEPS


@pytest.mark.parametrize("work", WORK)
def test_nice_and_threads(benchmark, work):
    before = torch.get_num_threads()
    streams = {(nice, threads): make_stream(nice, threads, work) for nice, threads in itertools.product(NICE, THREADS)}
    for trainer_threads in TRAINER_THREADS:
        torch.set_num_threads(trainer_threads)
        alone: list[float] = []
        ratios: dict[tuple[int, int], list[tuple[float, float]]] = {key: [] for key in streams}
        for _ in range(ROUNDS):
            for key, stream in streams.items():
                alone.append(steps_with(None)[0])
                step, computing = steps_with(stream)
                ratios[key].append((step / alone[-1], computing / alone[-1]))
        for (nice, threads), samples in ratios.items():
            step, computing = (statistics.median(values) for values in zip(*samples, strict=True))
            name = f"trainer_threads_{trainer_threads}_threads_{threads}_nice_{nice}"
            benchmark.extra_info[name] = {"step_over_alone": round(step, 3), "compute_over_alone": round(computing, 3)}
        benchmark.extra_info[f"alone_ms_{trainer_threads}"] = round(1e3 * statistics.median(alone), 2)
    benchmark.pedantic(steps_with, (streams[0, 1],), rounds=3)
    torch.set_num_threads(before)
    for stream in streams.values():
        stream.close()

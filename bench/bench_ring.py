"""What it costs to get images from another process: the hand-off, its latency, generating beside training.

Trainer and producer each have a core of their own where the machine has two.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from streamaug.config import Recipe, StreamConfig
from streamaug.orders import OrderBatch, Planner, Schedule
from streamaug.stream import Stream
from streamaug.stream.hashing import FillEngine
from streamaug.stream.ring import Slot

CORES = sorted(os.sched_getaffinity(0))
BATCH, LARGE, SMALL = 64, (3, 224, 224), (1, 8, 8)
WORK_SECONDS = 0.02


class Engine(FillEngine):
    """Fills the slot with one value, after as much arithmetic as `work` says."""

    def __init__(self, options: dict):
        super().__init__(options)
        self.work = options.get("work", 0)
        self.seconds = options.get("seconds", 0)

    def make(self, order: OrderBatch, slot: Slot) -> int:
        compute(self.work)
        time.sleep(self.seconds)
        return super().make(order, slot)


def build(options: dict) -> Engine:
    return Engine(options)


def compute(units: int) -> None:
    """Arithmetic on one core that stays in its cache: the same work takes the same time everywhere."""
    x = np.full(4096, 0.5)
    for _ in range(units):
        np.exp(-x, out=x)


def make_stream(image_shape: tuple[int, int, int], batch_size: int = BATCH, in_flight: int = 4, **options) -> Stream:
    schedule = Schedule(np.linspace(0, 1, 11), np.linspace(1, 0, 11))
    return Stream(
        Planner(np.arange(30) % 10, 10, schedule, [Recipe(kind="noise")], batch_size, seed=0),
        engine=f"{__name__}:build",
        engine_options={"image_shape": list(image_shape), **options},
        image_shape=image_shape,
        config=StreamConfig(batch_size=batch_size, in_flight=in_flight),
    )


@contextmanager
def core(number: int, pids: tuple[int, ...] = (0,)) -> Iterator[None]:
    """Bind processes to one core; for this process, until the end of the block."""
    before = os.sched_getaffinity(0)
    for pid in pids:
        os.sched_setaffinity(pid, {CORES[number % len(CORES)]})
    yield
    os.sched_setaffinity(0, before)


@contextmanager
def streaming(*arguments, **options) -> Iterator[Stream]:
    with make_stream(*arguments, **options) as stream:
        stream.take(1)
        with core(1, tuple(stream.producer_pids)), core(0):
            yield stream


def seconds_of(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def until_full(stream: Stream) -> None:
    """The producer has made all it may (the next order is issued by the next take), and sleeps."""
    deadline = time.monotonic() + 5
    while stream.stats().ring_fill < 0.75 and time.monotonic() < deadline:
        time.sleep(0.0005)
    time.sleep(0.001)


def test_handoff_over_copy(benchmark):
    """take() of a batch that is ready, beside a copy of as many bytes that no cache holds."""
    rng = np.random.default_rng(0)
    sources = [rng.integers(0, 256, (BATCH, *LARGE), np.uint8) for _ in range(5)]
    out = np.zeros_like(sources[0])
    takes, copies = [], []
    with streaming(LARGE) as stream:
        stream.take(BATCH - 1)
        for turn in range(80):
            until_full(stream)
            takes.append(seconds_of(lambda: stream.take(BATCH)))
            copies.append(seconds_of(lambda turn=turn: np.copyto(out, sources[turn % len(sources)])))
        benchmark.pedantic(stream.take, (BATCH,), setup=lambda: until_full(stream), rounds=20)
    record(benchmark, "handoff_over_copy", takes, copies, take_us=takes, copy_us=copies)


def test_dataloader_over_handoff(benchmark):
    """Batch after batch from a DataLoader's worker, beside take() from a producer that does the same work."""
    import torch
    from torch.utils.data import DataLoader

    class Filled(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 10_000

        def __getitem__(self, k: int) -> torch.Tensor:
            return torch.full((BATCH, *LARGE), k % 251, dtype=torch.uint8)

    loader = iter(DataLoader(Filled(), batch_size=None, num_workers=1, prefetch_factor=4))
    takes, loads = [], []
    with streaming(LARGE) as stream:
        for _ in range(6):
            until_full(stream)
            takes += [seconds_of(lambda: stream.take(BATCH)) for _ in range(20)]
            loads += [seconds_of(lambda: next(loader).sum(dtype=torch.int64)) for _ in range(10)]
        benchmark.pedantic(stream.take, (BATCH,), setup=lambda: until_full(stream), rounds=20)
    record(benchmark, "dataloader_over_handoff", loads, takes, take_us=takes, dataloader_us=loads)


def test_latency_p50_us(benchmark):
    """From the end of making a small batch to its arrival in the trainer, which waits for it."""
    latencies = []
    with streaming(SMALL, 8, 1, seconds=0.002) as stream:
        stream.take(7)
        for _ in range(300):
            stream.take(8)
            arrived = time.monotonic()
            latencies.append(arrived - stream.started_at - stream.stats().timeline[-1][1])
        benchmark.pedantic(stream.take, (8,), rounds=20)
    benchmark.extra_info["latency_p50_us"] = round(statistics.median(latencies) * 1e6, 1)
    benchmark.extra_info["latency_p99_us"] = round(float(np.percentile(latencies, 99)) * 1e6, 1)


ALONE = """
import sys, time
sys.path[:] = {path!r}
from {module} import compute
for line in sys.stdin:
    began = time.perf_counter()
    for _ in range({steps}):
        compute({units})
    print(time.perf_counter() - began, flush=True)
"""


def test_overlap_efficiency(benchmark):
    """Producer and trainer of equal speed, a core each: at the same time unconnected, beside connected."""
    units, steps = calibrated(), 25
    unconnected, connected = [], []
    code = ALONE.format(path=sys.path, module=__name__, units=units, steps=steps)
    other = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
        start_new_session=True,  # as producers are: Linux shares a core among sessions
    )
    assert other.stdin is not None and other.stdout is not None

    def ask() -> None:
        print(file=other.stdin, flush=True)

    def answer() -> float:
        return float(other.stdout.readline())

    with other, streaming(SMALL, work=units) as stream, core(1, (other.pid,)), core(0):
        ask(), answer()

        def train() -> None:
            for _ in range(steps):
                stream.take(BATCH)
                compute(units)

        for _ in range(12):
            stream.take(4 * BATCH)  # what was made in advance does not count
            stream.take(BATCH)
            compute(units)  # meanwhile a batch is made, as in the last step: as many are ready at the end as here
            connected.append(seconds_of(train))
            until_full(stream)
            ask()
            alone = seconds_of(lambda: [compute(units) for _ in range(steps)])
            unconnected.append(max(alone, answer()))
        benchmark.pedantic(train, setup=lambda: until_full(stream), rounds=2)
        other.stdin.close()
    record(benchmark, "overlap_efficiency", unconnected, connected, connected_us=connected)


def calibrated() -> int:
    """How many units of `compute` take WORK_SECONDS here."""
    compute(100)
    return max(int(100 * WORK_SECONDS / seconds_of(lambda: compute(100))), 1)


def record(benchmark, name: str, above: list[float], below: list[float], **samples: list[float]) -> None:
    benchmark.extra_info[name] = round(statistics.median(above) / statistics.median(below), 3)
    for label, values in samples.items():
        benchmark.extra_info[label] = round(statistics.median(values) * 1e6, 1)

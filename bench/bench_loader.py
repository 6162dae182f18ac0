"""What the loader costs: a wrapped loader at ratio 0, and the mixing of a batch.

ratio0_overhead: (wrapped loader at ratio 0 − bare loader, seconds a batch) ÷ one training step of a ResNet-18
on 32 images of 3×64×64; medians of alternated runs.
mix_over_step: converting 16 synthetic images and mixing them into such a batch, over the same step.
"""

import statistics
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from streamaug.config import StreamConfig
from streamaug.loader import StreamLoader
from streamaug.stream.batch import SynthBatch

BATCH, SHAPE, CLASSES = 32, (3, 64, 64), 10
PRELOADED, ROUNDS, STEPS = 2000, 15, 5


class ReadyStream(SimpleNamespace):
    """Delivers the same images at once: what is left is the loader's own time."""

    def __init__(self):
        super().__init__(
            image_shape=SHAPE,
            class_names=[str(label) for label in range(CLASSES)],
            config=StreamConfig(),
            loader_config=None,
            rank=0,
        )
        images = np.random.default_rng(0).integers(0, 256, (BATCH, *SHAPE), dtype=np.uint8)
        self.batch = SynthBatch.empty(BATCH, SHAPE)
        self.batch.images[:] = images
        for name in ("labels", "label_b", "label_mix", "ids", "scores", "rows", "starts"):
            getattr(self.batch, name)[:] = 0

    def take(self, n):
        return self.batch[:n]


def seconds_of(loader) -> float:
    """Seconds a batch."""
    began = time.perf_counter()
    count = sum(1 for _ in loader)
    return (time.perf_counter() - began) / count


@pytest.fixture(scope="module")
def preloaded():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(BATCH, *SHAPE, generator=generator)
    return [(images, torch.randint(0, CLASSES, (BATCH,), generator=generator))] * PRELOADED


@pytest.fixture(scope="module")
def step_seconds(preloaded) -> float:
    from torchvision.models import resnet18

    torch.manual_seed(0)
    model = resnet18(num_classes=CLASSES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    images, labels = preloaded[0]
    taken = []
    for _ in range(STEPS):
        began = time.perf_counter()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def test_ratio0_overhead(benchmark, preloaded, step_seconds):
    wrapped = StreamLoader(preloaded, ReadyStream(), ratio=0)
    pairs = [(seconds_of(preloaded), seconds_of(wrapped)) for _ in range(ROUNDS)]
    bare, wrapped_time = (statistics.median(side) for side in zip(*pairs, strict=True))
    benchmark.extra_info |= {
        "ratio0_overhead": (wrapped_time - bare) / step_seconds,
        "overhead_us_per_batch": (wrapped_time - bare) * 1e6,
        "step_ms": step_seconds * 1e3,
    }
    benchmark.pedantic(seconds_of, args=(wrapped,), rounds=3)


def test_mix_over_step(benchmark, preloaded, step_seconds):
    loader = StreamLoader(preloaded[:20], ReadyStream(), ratio=0.5)
    seconds_of(loader)
    mixed = statistics.median(seconds_of(loader) for _ in range(ROUNDS))
    benchmark.extra_info |= {"mix_over_step": mixed / step_seconds, "mix_us_per_batch": mixed * 1e6}
    benchmark.pedantic(seconds_of, args=(loader,), rounds=3)

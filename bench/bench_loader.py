"""What the loader costs: a wrapped loader at ratio 0, the mixing of a batch, and the mixers of nodes and of DALI.

ratio0_overhead: (wrapped loader at ratio 0 − bare loader, seconds a batch) ÷ one training step of a ResNet-18
on 32 images of 3×64×64; medians of alternated runs.
mix_over_step: converting 16 synthetic images and mixing them into such a batch, over the same step.
node_mix_over_sampler: 64 samples through our Mix ÷ through torchdata's MultiNodeWeightedSampler, of the same two nodes.
dali_mix_over_dali: a batch of 32 of DALIStreamLoader at ratio 0.5, of which 16 of the 32 decoded images are replaced ÷
a batch of the same pipeline alone (decode, resize, flip, normalise; JPEG of 3×64×64; one thread).
dali_defer_over_dali: the same with displaced="defer", where 16 are decoded. dali_ratio0_over_dali: at ratio 0.
"""

import functools
import itertools
import statistics
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from streamaug.config import StreamConfig
from streamaug.loader import Mix, StreamLoader, StreamNode
from streamaug.stream.batch import SynthBatch

BATCH, SHAPE, CLASSES = 32, (3, 64, 64), 10
PRELOADED, ROUNDS, STEPS = 2000, 15, 5


class ReadyStream(SimpleNamespace):
    """Delivers the same images at once: what is left is the loader's own time."""

    def __init__(self):
        super().__init__(
            image_shape=SHAPE,
            class_names=[str(label) for label in range(CLASSES)],
            config=StreamConfig(batch_size=BATCH),
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

    def state_dict(self):
        return {}


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


SAMPLES = 64


def endless(loader):
    while True:
        yield from loader


def test_node_mix_over_sampler(benchmark, alternate):
    from torchdata.nodes import IterableWrapper, MultiNodeWeightedSampler

    def node():
        return IterableWrapper(itertools.repeat((torch.rand(SHAPE), 0)))

    ours = Mix(node(), node(), 0.5)
    sampler = MultiNodeWeightedSampler({"real": node(), "synthetic": node()}, {"real": 0.5, "synthetic": 0.5})
    made = StreamNode(ReadyStream())

    def read(source):
        for _ in range(SAMPLES):
            next(source)

    seconds = alternate(
        rounds=50,
        calls=5,
        ours=functools.partial(read, ours),
        sampler=functools.partial(read, sampler),
        stream_node=functools.partial(read, made),
    )
    benchmark.extra_info |= {"node_mix_over_sampler": seconds["ours"] / seconds["sampler"]}


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    from PIL import Image

    root = tmp_path_factory.mktemp("jpegs")
    generator = np.random.default_rng(0)
    for i in range(8 * BATCH):
        path = root / str(i % CLASSES) / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        coarse = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(SHAPE[1:]).save(path)
    return str(root)


def test_dali_mix_over_dali(benchmark, alternate, jpegs):
    pytest.importorskip("nvidia.dali")
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    from streamaug.loader import DALIStreamLoader

    @pipeline_def(batch_size=BATCH, num_threads=1, device_id=None, exec_dynamic=False)
    def training(source=None):
        if source is None:
            encoded, labels = fn.readers.file(file_root=jpegs, random_shuffle=True, pad_last_batch=True, name="reader")
            images = fn.decoders.image(encoded, device="cpu")
        else:
            images, labels = fn.external_source(source=source, num_outputs=2)
        images = fn.resize(images, size=SHAPE[1:])
        mirror = fn.random.coin_flip()
        return fn.crop_mirror_normalize(images, mirror=mirror, dtype=types.FLOAT, std=[255.0] * 3), labels

    def mixed(ratio, **options):
        loader = DALIStreamLoader(training, ReadyStream(), ratio, **options)
        return functools.partial(next, endless(loader))

    alone = DALIGenericIterator(training(), ["data", "label"], reader_name="reader", auto_reset=True)
    seconds = alternate(
        rounds=60,
        calls=8,
        ours=mixed(0.5),
        defer=mixed(0.5, displaced="defer"),
        ratio0=mixed(0),
        alone=functools.partial(next, endless(alone)),
    )
    benchmark.extra_info |= {
        "dali_mix_over_dali": seconds["ours"] / seconds["alone"],
        "dali_defer_over_dali": seconds["defer"] / seconds["alone"],
        "dali_ratio0_over_dali": seconds["ratio0"] / seconds["alone"],
    }

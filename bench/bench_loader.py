"""What the loader costs: a wrapped loader at ratio 0, the mixing of a batch, and the mixers of nodes and of DALI.

ratio0_overhead: (wrapped loader at ratio 0 − bare loader, seconds a batch) ÷ one training step of a ResNet-18
on 32 images of 3×64×64; medians of alternated runs.
mix_over_step: converting 16 synthetic images and mixing them into such a batch, over the same step.
node_mix_over_sampler: 64 samples through our Mix ÷ through torchdata's MultiNodeWeightedSampler, of the same two nodes.
node_batches_over_sampler: batches of 32 of a stream and of real images, collated: Mix over StreamNode ÷ that sampler
over StreamNode.
dali_mix_over_conditional: a batch of 32 of DALIStreamLoader at ratio 0.5, displaced="defer", where 16 are decoded ÷
DALI's own mixer, a pipeline that draws for each sample whether it comes from its reader or from external_source, both
through the operators below.
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
        self.batch = SynthBatch.around(np.empty((BATCH, *SHAPE), np.uint8))
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


def test_node_batches_over_sampler(benchmark, alternate):
    from torch.utils.data import default_collate
    from torchdata.nodes import Batcher, IterableWrapper, Mapper, MultiNodeWeightedSampler

    image = torch.rand(SHAPE)

    def real():
        return IterableWrapper(itertools.repeat((image, 0)))

    def collated(samples):
        return Mapper(Batcher(samples, BATCH), default_collate)

    nodes = {"real": real(), "synthetic": StreamNode(ReadyStream(), like=image)}
    seconds = alternate(
        rounds=40,
        calls=4,
        ours=functools.partial(next, collated(Mix(real(), StreamNode(ReadyStream(), like=image), 0.5))),
        sampler=functools.partial(next, collated(MultiNodeWeightedSampler(nodes, dict.fromkeys(nodes, 0.5)))),
    )
    benchmark.extra_info |= {"node_batches_over_sampler": seconds["ours"] / seconds["sampler"]}


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

    from streamaug.loader import DALIStreamLoader, stream_source

    @pipeline_def(batch_size=BATCH, num_threads=1, device_id=None, exec_dynamic=False)
    def training(source=None):
        if source is None:
            encoded, labels = read()
            images = fn.decoders.image(encoded, device="cpu")
        else:
            images, labels = fn.external_source(source=source, num_outputs=2)
        return augmented(images), labels

    def read():
        return fn.readers.file(file_root=jpegs, random_shuffle=True, pad_last_batch=True, name="reader")

    def augmented(images):
        images = fn.resize(images, size=SHAPE[1:])
        mirror = fn.random.coin_flip()
        return fn.crop_mirror_normalize(images, mirror=mirror, dtype=types.FLOAT, std=[255.0] * 3)

    @pipeline_def(batch_size=BATCH, num_threads=1, device_id=None, exec_dynamic=False, enable_conditionals=True)
    def conditional():
        encoded, real_labels = read()
        made, made_labels = fn.external_source(source=stream_source(ReadyStream(), BATCH), num_outputs=2)
        if fn.random.coin_flip(dtype=types.BOOL):
            images = made
            labels = made_labels
        else:
            images = fn.decoders.image(encoded, device="cpu")
            labels = real_labels
        return augmented(images), labels

    def mixed(ratio, **options):
        loader = DALIStreamLoader(training, ReadyStream(), ratio, **options)
        return functools.partial(next, endless(loader))

    def bare(pipeline):
        iterator = DALIGenericIterator(pipeline, ["data", "label"], reader_name="reader", auto_reset=True)
        return functools.partial(next, endless(iterator))

    seconds = alternate(
        rounds=60,
        calls=8,
        ours=mixed(0.5),
        defer=mixed(0.5, displaced="defer"),
        ratio0=mixed(0),
        alone=bare(training()),
        conditional=bare(conditional()),
    )
    benchmark.extra_info |= {
        "dali_mix_over_dali": seconds["ours"] / seconds["alone"],
        "dali_defer_over_dali": seconds["defer"] / seconds["alone"],
        "dali_ratio0_over_dali": seconds["ratio0"] / seconds["alone"],
        "dali_mix_over_conditional": seconds["defer"] / seconds["conditional"],
    }

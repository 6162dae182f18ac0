"""A stream without a producer: image i is a function of i alone, so tests can tell what was delivered."""

import os
import signal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from streamaug.config import LoaderConfig, StreamConfig
from streamaug.stream.batch import SynthBatch

DIGITS = [str(digit) for digit in range(10)]


class FakeStream:
    """The part of Stream's surface that a loader uses. `available` limits what `starved: real` can give."""

    rank = 0
    world_size = 1
    asked_ratio: float | None = None

    def __init__(self, shape=(1, 8, 8), class_names=DIGITS, mixed=False, starved="wait", loader_config=None, rank=0):
        self.image_shape = shape
        self.class_names = class_names
        self.config = StreamConfig(batch_size=16, starved=starved)
        self.loader_config: LoaderConfig | None = loader_config
        self.rank = rank
        self.mixed = mixed
        self.available = None
        self.next_id = 0
        self.calls = 0
        self.class_weights = None
        self.replans = 0

    def replan(self, *, class_weights=None):
        self.replans += 1
        self.class_weights = None if class_weights is None else class_weights.tolist()

    def take(self, n):
        self.calls += 1
        if self.available is not None:
            n = min(n, self.available)
        ids = np.arange(self.next_id, self.next_id + n)
        self.next_id += n
        batch = SynthBatch.around(np.empty((n, *self.image_shape), np.uint8))
        batch.ids[:] = ids
        batch.images[:] = (ids % 200 + 50).astype(np.uint8)[:, None, None, None]
        batch.images[:, :, :, 5:7] = 0
        batch.images[:, :, 0, 0] = 0
        batch.labels[:] = ids % len(self.class_names)
        batch.label_b[:] = (ids + 1) % len(self.class_names) if self.mixed else batch.labels
        batch.label_mix[:] = 0.25 if self.mixed else 0.0
        batch.scores[:] = 1.0
        batch.fresh[:] = True
        return batch

    def state_dict(self):
        self.calls += 1
        return {"next_id": self.next_id, "class_weights": self.class_weights}

    def load_state_dict(self, state):
        self.next_id = state["next_id"]
        self.class_weights = state["class_weights"]


class Steered(FakeStream):
    """Makes images of the class that has the most weight, and with ids from 1000 on after a call of `feedback`."""

    first = 0

    def feedback(self):
        self.first += 1000

    def take(self, n):
        made = super().take(n)
        made.labels[:] = made.label_b[:] = 0 if self.class_weights is None else int(np.argmax(self.class_weights))
        made.ids += self.first
        return made

    def state_dict(self):
        return super().state_dict() | {"first": self.first}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.first = state["first"]


class Images(Dataset):
    """Real images: float32 [1, 8, 8] in [0, 1], of which pixel [0, 1] tells the index as index / 1000.

    About as bright and contrasted as the fake stream's.
    """

    def __init__(self, count=40, draws=False, transform=None):
        self.count, self.draws = count, draws
        self.transform = transform

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        image = torch.full((1, 8, 8), 0.35)
        image[0, :, 5:7] = 0.0
        image[0, 0, 0], image[0, 7, 7] = 0.0, 1.0
        image[0, 0, 1] = index / 1000
        if self.draws:
            image[0, 3, 3] = torch.rand(())
        return image, index % 10


class FailingImages(Images):
    def __getitem__(self, index):
        if index == 20:
            raise RuntimeError("unreadable image 20")
        return super().__getitem__(index)


class DyingImages(Images):
    """Kills the worker process that reads image 0."""

    def __getitem__(self, index):
        if index == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def real_loader(count=40, batch_size=8, loader=DataLoader, **options):
    return loader(Images(count, draws=options.pop("draws", False)), batch_size=batch_size, **options)


def real_indices(batch, ids=None):
    """Indices of the real images in a delivered batch, in order."""
    images = batch[0]
    ids = batch[2] if ids is None else ids
    return [round(value * 1000) for value in images[ids < 0][:, 0, 0, 1].tolist()]


def listed(batch):
    """A batch as something comparable."""
    return [value.tolist() for value in (batch.values() if isinstance(batch, dict) else batch)]

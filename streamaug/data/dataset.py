"""A torch data set over an ImageSet, shaped like torchvision's own: what the trainer's DataLoader reads."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from streamaug.data.images import ImageSet


class ImageDataset(Dataset):
    """Yields (float32 [C, H, W] in [0, 1], int label), the label as float32 [classes] if `soft`.

    `classes` are the class names. `transform` is always None: the pixels come as they are, and augmentation belongs to
    the training step.
    """

    transform: Any = None

    def __init__(self, images: ImageSet, *, soft: bool = False):
        self.images = images
        self.soft = soft
        self.classes = images.class_names
        self.targets = images.labels.tolist()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Any]:
        label = self.targets[index]
        if self.soft:
            label = torch.nn.functional.one_hot(torch.tensor(label), len(self.classes)).float()
        return pixels(self.images, index), label


class Batches:
    """All images in their order, as often as wanted: (fp32 [B, C, H, W] in [0, 1], int64 [B])."""

    def __init__(self, images: ImageSet, batch_size: int = 512):
        self.images = images
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for start in range(0, len(self.images), self.batch_size):
            part = slice(start, start + self.batch_size)
            yield pixels(self.images, part), torch.from_numpy(self.images.labels[part])


def pixels(images: ImageSet, at: int | slice | np.ndarray = slice(None)) -> torch.Tensor:
    """The images at these indices, fp32 [n, C, H, W] in [0, 1]; of a single one [C, H, W]."""
    return torch.from_numpy(images.images[at]).float().div_(255)

"""A torch data set over an ImageSet, shaped like torchvision's own: what the trainer's DataLoader reads."""

from typing import Any

import torch
from torch.utils.data import Dataset

from streamaug.data.images import ImageSet


class ImageDataset(Dataset):
    """Yields (float32 [C, H, W] in [0, 1], int label); `classes` are the class names.

    `transform` is always None: the pixels come as they are, and augmentation belongs to the training step.
    """

    transform: Any = None

    def __init__(self, images: ImageSet):
        self.images = images
        self.classes = images.class_names
        self.targets = images.labels.tolist()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(self.images.images[index]).float().div_(255), self.targets[index]

"""A torch data set over an ImageSet, shaped like torchvision's own: what the trainer's DataLoader reads."""

from typing import Any

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
        return torch.from_numpy(self.images.images[index]).float().div_(255), label

"""A linear probe on the generator's own features, averaged with the judge's classifier.

The generator has seen far more images than are labelled, and the middle of its network tells classes apart: diffusion
models are self-supervised learners (Baranchuk et al. 2022, "Label-Efficient Semantic Segmentation with Diffusion
Models"; Xiang et al. 2023, "Denoising Diffusion Autoencoders are Unified Self-supervised Learners").
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from streamaug.config import AugmentConfig
from streamaug.data import Batches, ImageSet
from streamaug.sampling.denoisers.base import Denoiser
from streamaug.training.augment import augment

_AUGMENTED = 20  # augmented copies of the labelled images that the probe is fitted on, where they are few
_READ = 20_000  # images the denoiser reads for that, about: the probe's steps do not look at more
_AT_ONCE = 1024
_STEPS, _BATCH, _LR, _WEIGHT_DECAY, _LABEL_SMOOTHING = 200, 128, 2e-3, 0.1, 0.1


@dataclass(frozen=True)
class Features:
    """What the denoiser makes of an image [B, C, H, W] in [0, 1] at a timestep: fp32 [B, size], where the image is.

    The trainer fits its judge on the CPU, whatever device the denoiser runs on.
    """

    denoiser: Denoiser
    timestep: float

    @property
    def size(self) -> int:
        return self.denoiser.feature_size

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        found = self.denoiser.features((images * 2 - 1).to(self.denoiser.device), self.timestep)
        return found.to(images.device, torch.float32)


class Probed(nn.Module):
    """A classifier whose probabilities are averaged with those of a linear probe on the denoiser's features.

    Takes images [B, C, H, W] in [0, 1], returns log-probabilities [B, num_classes]. The denoiser is no part of its
    state; a gradient flows through the classifier alone.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, classifier: nn.Module, features: Features, num_classes: int):
        super().__init__()
        self.classifier = classifier
        self.features = features
        self.probe = nn.Linear(features.size, num_classes)
        self.register_buffer("mean", torch.zeros(features.size))
        self.register_buffer("std", torch.ones(features.size))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        probe = self.probe((self.features(images) - self.mean) / self.std)
        mean = torch.softmax(self.classifier(images).float(), 1) + torch.softmax(probe, 1)
        return torch.log(mean / 2)

    @staticmethod
    def pixels(classifier: nn.Module) -> nn.Module:
        """The classifier of pixels alone, with or without a probe beside it."""
        return classifier.classifier if isinstance(classifier, Probed) else classifier

    def fit_probe(self, labelled: ImageSet, config: AugmentConfig, seed: int) -> None:
        """Fit the probe on the images and augmented copies of them: same arguments, same probe."""
        random = torch.Generator().manual_seed(seed)
        if len(labelled) > _READ:
            labelled = labelled.subset(torch.randperm(len(labelled), generator=random)[:_READ].sort().values.numpy())
        copies = 1 + min(_AUGMENTED, _READ // len(labelled))
        found = torch.cat(
            [
                self.features(augment(images, config, random) if copy else images)
                for copy in range(copies)
                for images, _ in Batches(labelled, _AT_ONCE)
            ]
        )
        targets = torch.from_numpy(labelled.labels).repeat(copies)
        self.mean.copy_(found.mean(0))
        self.std.copy_(found.std(0) + 1e-3)
        found = (found - self.mean) / self.std
        nn.init.zeros_(self.probe.weight)
        nn.init.zeros_(self.probe.bias)
        optimizer = torch.optim.AdamW(self.probe.parameters(), lr=_LR, weight_decay=_WEIGHT_DECAY)
        for _ in range(_STEPS):
            chosen = torch.randint(len(found), (_BATCH,), generator=random)
            loss = F.cross_entropy(self.probe(found[chosen]), targets[chosen], label_smoothing=_LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

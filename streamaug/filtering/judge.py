"""The judge: scores each generated image inside the producer and decides whether it is delivered.

An image passes when the judge agrees with its label, or is unsure and still finds the label likely; a confident
disagreement, a non-finite image and a flat one never pass.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from streamaug.config import JudgeConfig
from streamaug.kernels.emit import finite
from streamaug.orders import REASONS

_CODE = {reason: code for code, reason in enumerate(REASONS)}
_FLAT = 2 / 255  # standard deviation below which an image in [-1, 1] has no contrast


class Judge(nn.Module):
    """A classifier of images in [0, 1] with per-class thresholds.

    floor: fp32 [C], the least probability an unsure judge must give the label; confident: fp32 [C], indexed by the
    class the judge prefers: above it, disagreement is a rejection. Both are buffers, so they travel with the weights.
    """

    floor: torch.Tensor
    confident: torch.Tensor

    def __init__(self, classifier: nn.Module, num_classes: int, config: JudgeConfig):
        super().__init__()
        self.classifier = classifier
        self.top_k = min(config.top_k, num_classes)
        self.min_score = config.min_score
        self.too_easy = config.too_easy
        self.register_buffer("floor", torch.full((num_classes,), config.floor))
        self.register_buffer("confident", torch.full((num_classes,), config.confident))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [B, C] for images [B, C, H, W] in [-1, 1]."""
        return self.classifier((images + 1) / 2)

    @torch.no_grad()
    def score(
        self, images: torch.Tensor, labels: torch.Tensor, labels_b: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Probability of the label, fp32 [B] (0 where not finite), and the index into REASONS, uint8 [B].

        images: [B, C, H, W] in [-1, 1]; labels: int64 [B]; labels_b: the second class of mixed labels, equal to the
        first where they are not mixed. A mixed image's probability is that of either class.
        """
        labels_b = labels if labels_b is None else labels_b
        is_finite = finite(images)
        safe = torch.where(is_finite.view(-1, 1, 1, 1), images, 0.0).float()
        probability = torch.softmax(self(safe.clamp(-1, 1)).float(), dim=1)
        each = probability.gather(1, torch.stack([labels, labels_b], 1))  # [B, 2]
        score = torch.where(labels == labels_b, each[:, 0], each.sum(1))
        top, preferred = probability.max(dim=1)
        agrees = (preferred == labels) | (preferred == labels_b)
        rank = (probability > each.amax(1, keepdim=True)).sum(1)

        floor = torch.minimum(self.floor[labels], self.floor[labels_b])
        unlikely = ~agrees & ((score < floor) | (rank >= self.top_k))
        found = {
            "unlikely_label": unlikely | (score < self.min_score),
            "confidently_wrong": ~agrees & (top >= self.confident[preferred]),
        }
        if self.too_easy is not None:
            found["too_easy"] = agrees & (score > self.too_easy)
        return score * is_finite, _reasons(found | {"no_contrast": flat(safe), "non_finite": ~is_finite})


@torch.no_grad()
def score_unjudged(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What holds without a judge: finite images with contrast pass, with score 1."""
    is_finite = finite(images)
    without_contrast = flat(torch.where(is_finite.view(-1, 1, 1, 1), images, 0.0))
    return is_finite.float(), _reasons({"no_contrast": without_contrast, "non_finite": ~is_finite})


def _reasons(found: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The last reason found for each image, from masks bool [B]: indices into REASONS, uint8 [B], 0 for none."""
    reasons = torch.zeros_like(next(iter(found.values())), dtype=torch.uint8)
    for reason, mask in found.items():
        reasons.masked_fill_(mask, _CODE[reason])  # an assignment by mask would wait for the GPU
    return reasons


def flat(images: torch.Tensor) -> torch.Tensor:
    """Which of finite images [B, C, H, W] in [-1, 1] have no contrast, bool [B]."""
    return images.float().clamp(-1, 1).flatten(1).std(dim=1) < _FLAT


def pack_state(module: nn.Module) -> np.ndarray:
    """A module's parameters and buffers as one uint8 array, in state_dict order."""
    parts = [value.detach().cpu().contiguous().numpy().tobytes() for value in module.state_dict().values()]
    return np.frombuffer(b"".join(parts), dtype=np.uint8).copy()


@torch.no_grad()
def unpack_state(module: nn.Module, packed: np.ndarray) -> None:
    """Fill a module of the same architecture from `pack_state`'s array."""
    at = 0
    for value in module.state_dict().values():
        size = value.numel() * value.element_size()
        source = torch.frombuffer(bytearray(packed[at : at + size].tobytes()), dtype=value.dtype)
        value.copy_(source.view(value.shape))
        at += size
    if at != len(packed):
        raise ValueError(f"the packed state holds {len(packed)} bytes, the module needs {at}")

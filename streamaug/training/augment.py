"""Classical augmentation of a whole batch: one random affine map and flip per image, from its own generator."""

import math

import torch
import torch.nn.functional as F

from streamaug.config import AugmentConfig


def augment(images: torch.Tensor, config: AugmentConfig, generator: torch.Generator) -> torch.Tensor:
    """Rotate, shift, scale and flip each of images [B, C, H, W] in [0, 1]; what enters from outside is 0."""
    size = len(images)

    def uniform(bound: float) -> torch.Tensor:
        return (torch.rand(size, generator=generator) * 2 - 1) * bound

    angle = uniform(math.radians(config.rotation))
    zoom = 1 + uniform(config.scale)
    mirror = torch.where(uniform(1.0) < 0, -1.0, 1.0) if config.flip else torch.ones(size)
    cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    # The image side is 2 in the affine grid's units.
    rows = [
        torch.stack([cos * mirror, -sin, 2 * uniform(config.shift)], 1),
        torch.stack([sin * mirror, cos, 2 * uniform(config.shift)], 1),
    ]
    theta = torch.stack(rows, 1).to(images.device, images.dtype)  # [B, 2, 3]
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)

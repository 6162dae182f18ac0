"""The encode method: a row is the image itself, or its latent under the model's autoencoder; orders noise it."""

import math
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from streamaug.bank import Checkpoint, Part
from streamaug.config import BankConfig
from streamaug.sampling.denoisers import FAMILIES, LoadSettings, ModelInfo
from streamaug.sampling.denoisers.autoencoder import load_autoencoder

GROUP_ROWS = 64
_PIXELS_AT_ONCE = 1 << 20  # decoded together: a few GiB of activations in fp32


class Encode:
    """Tensors: "latent" [n, c, h, w], and "encode.error" [n], of the image that the stored latent decodes to."""

    def __init__(self, info: ModelInfo, config: BankConfig, codec: "Codec"):
        meta = {"model": info.digest, "latent_shape": list(info.latent_shape)}
        self.part = Part("encode", meta, GROUP_ROWS, config.dtype, row_bytes(info, config))
        self._codec = codec

    def compute(
        self, images: np.ndarray, labels: np.ndarray, rows: np.ndarray, checkpoint: Checkpoint
    ) -> dict[str, torch.Tensor]:
        latent = self._codec.encode(images).to(self.part.torch_dtype)
        back = self._codec.decode(latent.float())
        return {"latent": latent, "encode.error": relative_error(back, pixels_to_latent(images))}


def row_bytes(info: ModelInfo, config: BankConfig) -> int:
    """What a latent takes in the bank."""
    return math.prod(info.latent_shape) * getattr(torch, config.dtype).itemsize


class Codec:
    """Images to what the model's sampler works on, and back; the autoencoder's weights are read when first used.

    A pixel model's latent is the image. A cascade's is the image at the size of its first stage, enlarged on the way
    back. info: of the model; variant: of its weights' files.
    """

    def __init__(self, info: ModelInfo, device: torch.device, variant: str | None = None):
        self._info, self._device, self._variant = info, device, variant

    def encode(self, images: np.ndarray) -> torch.Tensor:
        """uint8 [n, C, H, W] to fp32 [n, c, h, w] on the CPU."""
        return pixels_to_latent(images) if self._info.pixels else self._encoder(images)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """fp32 [n, c, h, w] to images fp32 [n, C, H, W], in [-1, 1] as far as the decoder keeps to it, on the CPU."""
        if self._info.pixels:
            return latents
        _, height, width = self._info.image_shape
        if self._info.upscaler is not None:
            return F.interpolate(latents, (height, width), mode="bilinear")
        at_once = max(1, _PIXELS_AT_ONCE // (height * width))
        parts = [self._autoencoder.decode(part.to(self._device)).float().cpu() for part in latents.split(at_once)]
        return torch.cat(parts)

    @cached_property
    def _encoder(self) -> Any:
        return FAMILIES[self._info.family].encoder(self._info, self._device, self._variant)

    @cached_property
    def _autoencoder(self) -> Any:
        return load_autoencoder(self._info, LoadSettings(self._device, channels_last=False, variant=self._variant))


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The norm of each row's difference, as a part of the norm of the row that is wanted: fp32 [n]."""
    difference, size = ((each.float().flatten(1).norm(dim=1)) for each in (found - wanted, wanted))
    return difference / size.clamp(min=1e-12)


def pixels_to_latent(images: np.ndarray) -> torch.Tensor:
    """uint8 [n, C, H, W] to float32 in [-1, 1]."""
    return torch.from_numpy(images).float().div_(127.5).sub_(1.0)


def latent_to_pixels(latent: torch.Tensor) -> torch.Tensor:
    """The uint8 pixels of a pixel latent: those `pixels_to_latent` was given, whatever dtype stored it."""
    return latent.float().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)

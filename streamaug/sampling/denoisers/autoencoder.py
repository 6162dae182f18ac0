"""The autoencoder between images and latents: the model's own KL autoencoder, or a tiny one that decodes faster."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from streamaug.errors import ModelError
from streamaug.sampling.denoisers.base import (
    LoadSettings,
    ModelInfo,
    digest_of_files,
    load_network,
    read_json,
    weight_files,
)

_PIXELS_AT_ONCE = 1 << 20  # encoded together: a few GiB of activations in fp32


class Autoencoder:
    """Images [B, C, H, W] in [-1, 1] to scaled latents [B, c, h, w] and back, fp32 outside whatever runs inside.

    Tiling and slicing stay off: images of a training resolution fit, and both cost time.
    """

    def __init__(self, vae: Any, device: torch.device, *, channels_last: bool = False):
        self.vae = vae.to(device).eval().requires_grad_(False)
        if channels_last:
            self.vae = self.vae.to(memory_format=torch.channels_last)
        config = vae.config
        self.scale = float(config.get("scaling_factor") or 1.0)
        self.shift = float(config.get("shift_factor") or 0.0)
        mean, std = config.get("latents_mean"), config.get("latents_std")
        self.mean = None if mean is None else torch.tensor(mean, device=device).view(1, -1, 1, 1)
        self.std = None if std is None else torch.tensor(std, device=device).view(1, -1, 1, 1)
        self.tiny = type(vae).__name__ == "AutoencoderTiny"

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """The mode of the posterior, so that a row is a function of its image."""
        encoded = self.vae.encode(images.to(self.vae.device, self.vae.dtype))
        latents = (encoded.latents if self.tiny else encoded.latent_dist.mode()).float()
        if self.mean is not None and self.std is not None:
            return (latents - self.mean) * self.scale / self.std
        return (latents - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        if self.mean is not None and self.std is not None:
            latents = latents * self.std / self.scale + self.mean
        else:
            latents = latents / self.scale + self.shift
        return self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]


def load_autoencoder(info: ModelInfo, settings: LoadSettings) -> Autoencoder:
    """The folder's `vae`, or the AutoencoderTiny of `settings.tiny_vae`.

    A KL autoencoder whose configuration says `force_upcast` overflows in fp16 and runs in fp32. Raises ModelError,
    also for a tiny one of another latent or image shape than the model's.
    """
    import diffusers

    device, dtype, channels_last = settings.device, settings.dtype, settings.channels_last
    if settings.tiny_vae is not None:
        return Autoencoder(_load_tiny(info, settings.tiny_vae, dtype), device, channels_last=channels_last)
    name = read_json(info.path, "vae/config.json").get("_class_name")
    if name not in ("AutoencoderKL", "AutoencoderTiny"):
        raise ModelError(
            f"{info.path}: the autoencoder {name} is not supported; supported: AutoencoderKL, AutoencoderTiny"
        )
    vae = load_network(getattr(diffusers, name), info, "vae", dtype=dtype, variant=settings.variant)
    if dtype == torch.float16 and vae.config.get("force_upcast"):
        vae = vae.to(torch.float32)
    return Autoencoder(vae, device, channels_last=channels_last)


def digest_of_tiny(path: Path) -> str:
    """Hash of an AutoencoderTiny's configuration and weights. Raises ModelError."""
    return digest_of_files([path / "config.json", *weight_files(path.parent, path.name)])


def _load_tiny(info: ModelInfo, path: Path, dtype: torch.dtype) -> Any:
    import diffusers

    config = read_json(path, "config.json")
    name = config.get("_class_name")
    if name != "AutoencoderTiny":
        raise ModelError(
            f"model.tiny_vae {path}: the folder of {name or 'no diffusers model'}, expected an AutoencoderTiny"
        )
    latent, image = info.latent_shape, info.image_shape
    levels = len(config.get("decoder_block_out_channels", (64,) * 4))
    made = (config.get("latent_channels", 4), config.get("out_channels", 3), 2 ** (levels - 1))
    wanted = (latent[0], image[0], image[1] // latent[1])
    if made != wanted:
        raise ModelError(
            f"model.tiny_vae {path}: decodes {made[0]} latent channels to {made[1]} at {made[2]} times the size, the "
            f"model needs {wanted[0]} to {wanted[1]} at {wanted[2]} times: take the one made for this family"
        )
    try:
        return diffusers.AutoencoderTiny.from_pretrained(path, torch_dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"model.tiny_vae {path}: cannot be loaded: {error}") from None


def factor_of(config: dict[str, Any]) -> int:
    """Pixels that a latent cell covers, from vae/config.json."""
    return 2 ** (len(config.get("block_out_channels", [0])) - 1)


def encoder(info: ModelInfo, device: torch.device, variant: str | None = None) -> Any:
    """A function of uint8 [n, C, H, W] to latents fp32 [n, c, h, w] on the CPU: what a bank's rows are made with.

    The weights are read at its first call: a bank that is complete needs none.
    """
    loaded = cache(lambda: load_autoencoder(info, LoadSettings(device, channels_last=False, variant=variant)))

    def encode(images: np.ndarray) -> torch.Tensor:
        at_once = max(1, _PIXELS_AT_ONCE // (images.shape[-2] * images.shape[-1]))
        pixels = torch.from_numpy(images).float().div_(127.5).sub_(1.0)
        return torch.cat([loaded().encode(part).cpu() for part in pixels.split(at_once)])

    return encode

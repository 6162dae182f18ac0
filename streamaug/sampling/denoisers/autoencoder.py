"""The autoencoder between images and latents: the model's own KL autoencoder, or a tiny one that decodes faster."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from streamaug.errors import ModelError
from streamaug.sampling.denoisers.base import ModelInfo, load_network, read_json


class Autoencoder:
    """Images [B, C, H, W] in [-1, 1] to scaled latents [B, c, h, w] and back, fp32 outside whatever runs inside.

    Tiling and slicing stay off: images of a training resolution fit, and both cost time.
    """

    def __init__(self, vae: Any, device: torch.device):
        self.vae = vae.to(device).eval().requires_grad_(False)
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


def load_autoencoder(
    info: ModelInfo,
    *,
    device: torch.device,
    dtype: torch.dtype,
    variant: str | None = None,
    tiny: Path | None = None,
) -> Autoencoder:
    """The folder's `vae`, or the AutoencoderTiny in the folder `tiny`.

    A KL autoencoder whose configuration says `force_upcast` overflows in fp16 and runs in fp32. Raises ModelError.
    """
    import diffusers

    if tiny is not None:
        name = read_json(tiny, "config.json").get("_class_name")
        if name != "AutoencoderTiny":
            raise ModelError(f"model.tiny_vae {tiny}: a {name}, expected an AutoencoderTiny")
        try:
            vae = diffusers.AutoencoderTiny.from_pretrained(tiny, torch_dtype=dtype, use_safetensors=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError(f"model.tiny_vae {tiny}: cannot be loaded: {error}") from None
        return Autoencoder(vae, device)
    name = read_json(info.path, "vae/config.json").get("_class_name")
    if name not in ("AutoencoderKL", "AutoencoderTiny"):
        raise ModelError(f"{info.path}: the autoencoder {name} is not supported; supported: AutoencoderKL")
    vae = load_network(getattr(diffusers, name), info, "vae", dtype=dtype, variant=variant)
    if dtype == torch.float16 and vae.config.get("force_upcast"):
        vae = vae.to(torch.float32)
    return Autoencoder(vae, device)


def factor_of(config: dict[str, Any]) -> int:
    """Pixels that a latent cell covers, from vae/config.json."""
    return 2 ** (len(config.get("block_out_channels", [0])) - 1)


def encoder(info: ModelInfo, device: torch.device, variant: str | None = None) -> Any:
    """A function of uint8 [n, C, H, W] to latents fp32 [n, c, h, w] on the CPU: what a bank's rows are made with.

    The weights are read at its first call: a bank that is complete needs none.
    """
    loaded = cache(lambda: load_autoencoder(info, device=device, dtype=torch.float32, variant=variant))

    def encode(images: np.ndarray) -> torch.Tensor:
        pixels = torch.from_numpy(images).float().div_(127.5).sub_(1.0)
        return loaded().encode(pixels).cpu()

    return encode

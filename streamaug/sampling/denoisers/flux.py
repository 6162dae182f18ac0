"""Flux: flow matching on latents in 2x2 patches, told by T5 tokens, a pooled CLIP vector and, in Flux-dev, a scale."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from streamaug.errors import ModelError
from streamaug.orders import OrderBatch
from streamaug.sampling.denoisers.autoencoder import Autoencoder, encoder, factor_of, load_autoencoder
from streamaug.sampling.denoisers.base import (
    Conditioning,
    LoadSettings,
    ModelInfo,
    Rows,
    digest_of,
    load_network,
    multiple_of,
    read_json,
)
from streamaug.sampling.denoisers.prompts import (
    Prompted,
    PromptTable,
    encode_clip,
    prompt_conditioning,
    text_digest_of,
    text_files,
)
from streamaug.sampling.denoisers.shift import shift_for, takes
from streamaug.sampling.denoisers.t5 import encode_t5

__all__ = ["Flux", "encode_text", "encoder", "inspect", "load", "text_digest", "timing"]

FAMILY = "Flux"
PIPELINES = ("FluxPipeline", "FluxImg2ImgPipeline")

_NATIVE_SIDE = 128  # latent cells; the configuration does not say
_ENCODERS = ("text_encoder", "text_encoder_2")  # a CLIP and a T5


def inspect(path: Path, index: dict[str, Any], image_size: int | None, variant: str | None) -> ModelInfo:
    transformer, vae = read_json(path, "transformer/config.json"), read_json(path, "vae/config.json")
    packed, channels = transformer.get("in_channels", 64), vae.get("latent_channels", 4)
    if packed != 4 * channels:
        raise ModelError(
            f"{path}: the transformer takes {packed} channels, the vae has {channels}; accepted are models that take "
            "2x2 patches of the vae's channels, four times as many"
        )
    factor = factor_of(vae)
    side = multiple_of(path, image_size or _NATIVE_SIDE * factor, 2 * factor) // factor
    text_files(path, _ENCODERS, variant)
    return ModelInfo(
        path=path,
        family=FAMILY,
        pipeline=str(index["_class_name"]),
        image_shape=(vae.get("out_channels", 3), side * factor, side * factor),
        latent_shape=(channels, side, side),
        conditioning="prompt",
        num_classes=0,
        null_class=None,
        guidance="embedded" if transformer.get("guidance_embeds") else "none",
        digest=digest_of(path, ["transformer", "vae"], variant),
    )


def load(info: ModelInfo, settings: LoadSettings) -> "Flux":
    """Read the weights. Raises ModelError when they do not fit the configuration or are not finite."""
    from diffusers import FluxTransformer2DModel

    network = load_network(FluxTransformer2DModel, info, "transformer", dtype=settings.dtype, variant=settings.variant)
    vae = load_autoencoder(info, settings)
    return Flux(network, info, settings, vae)


def timing(info: ModelInfo, scheduler: Any, steps: int) -> dict[str, Any] | None:
    """What the pipeline passes to `set_timesteps`: evenly spaced noise levels, and their shift for the image's size."""
    found: dict[str, Any] = {}
    if takes(scheduler, "sigmas") and not scheduler.config.get("use_flow_sigmas"):
        found["sigmas"] = np.linspace(1.0, 1 / steps, steps).tolist()
    _, height, width = info.latent_shape
    return {**found, **shift_for(scheduler, (height // 2) * (width // 2), max_shift=1.15)} or None


def text_digest(info: ModelInfo, variant: str | None) -> str:
    """Hash of what the encoded prompts depend on besides their texts."""
    return text_digest_of(info.path, _ENCODERS, variant)


def encode_text(
    info: ModelInfo, texts: Sequence[str], variant: str | None, device: torch.device
) -> dict[str, torch.Tensor]:
    """{"tokens": [N, L, D] of the T5, "pooled": [N, P] of the CLIP} fp32. Raises ModelError, and PromptTooLong."""
    clip, t5 = _ENCODERS
    # The models without embedded guidance (schnell) were distilled with the shorter prompts.
    length = 512 if info.guidance == "embedded" else 256
    _, pooled = encode_clip(info.path, clip, texts, variant=variant, device=device)
    return {"tokens": encode_t5(info.path, t5, texts, length, variant=variant, device=device), "pooled": pooled}


class Flux(Prompted):
    """The conditioning is {"tokens": [n, tokens, width], "pooled": [n, width]}, and "scale" fp32 [n] in Flux-dev."""

    embeddings = ("tokens", "pooled")

    def __init__(self, network: Any, info: ModelInfo, settings: LoadSettings, vae: Autoencoder):
        network.pos_embed = self._positions = _Positions(network.pos_embed)
        super().__init__(network, info, settings)
        self.vae = vae
        if settings.prompts is not None:
            self.prompts = PromptTable.load(settings.prompts, self.device, self.dtype)

    def condition(self, order: OrderBatch, rows: Rows, guided: bool) -> Conditioning:
        found = prompt_conditioning(order, rows, self.prompts, guided, self.embeddings)
        conditioning = {name: value.to(self.dtype) for name, value in found.items()}
        if self.network.config.guidance_embeds:
            conditioning["scale"] = self.told_scale(order, guided)
        return conditioning

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        h, w = x.shape[2:]
        text_ids, image_ids = self._positions.choose(conditioning["tokens"].shape[1], h, w, x.device)
        out = self.network(
            hidden_states=pack(x),
            timestep=timestep.to(x.dtype).expand(len(x)) / 1000,
            guidance=conditioning.get("scale"),
            encoder_hidden_states=conditioning["tokens"],
            pooled_projections=conditioning["pooled"],
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        return unpack(out, h, w)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """[n, c, h, w] to patches of 2x2 cells, [n, h/2 * w/2, 4c], rows first."""
    n, c, h, w = latents.shape
    return latents.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, 4 * c)


def unpack(patches: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """The inverse of `pack`: [n, h/2 * w/2, 4c] to [n, c, h, w], contiguous."""
    n, _, width = patches.shape
    return patches.reshape(n, h // 2, w // 2, width // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(n, width // 4, h, w)


class _Positions(nn.Module):
    """In the place of the network's `pos_embed`: rotary embeddings computed once for each shape and kept."""

    def __init__(self, rotary: nn.Module):
        super().__init__()
        self.rotary = rotary
        self._ids: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}
        self._kept: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}
        self._now: tuple[torch.Tensor, torch.Tensor] | None = None

    def choose(self, tokens: int, h: int, w: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Position ids of the text [tokens, 3] and of the patches [h/2 * w/2, 3]; `forward` now answers for them."""
        shape = tokens, h, w, device
        if shape not in self._ids:
            image_ids = torch.cartesian_prod(torch.zeros(1), torch.arange(h / 2), torch.arange(w / 2)).to(device)
            self._ids[shape] = torch.zeros(tokens, 3, device=device), image_ids
            self._kept[shape] = self.rotary(torch.cat(self._ids[shape]))
        self._now = self._kept[shape]
        return self._ids[shape]

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._now is not None, "choose is called before the network"
        return self._now

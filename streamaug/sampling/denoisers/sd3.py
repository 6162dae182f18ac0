"""Stable Diffusion 3: flow matching on latents, told by tokens and a pooled vector of two CLIPs and an optional T5."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

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
    square,
)
from streamaug.sampling.denoisers.prompts import (
    Prompted,
    PromptTable,
    encode_clip,
    prompt_conditioning,
    text_digest_of,
    text_files,
)
from streamaug.sampling.denoisers.shift import shift_for
from streamaug.sampling.denoisers.t5 import encode_t5

__all__ = ["StableDiffusion3", "encode_text", "encoder", "inspect", "load", "text_digest", "timing"]

FAMILY = "Stable Diffusion 3"
PIPELINES = ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline")

_CLIPS, _T5 = ("text_encoder", "text_encoder_2"), "text_encoder_3"
_T5_TOKENS = 256  # what the pipeline pads a prompt to


def inspect(path: Path, index: dict[str, Any], image_size: int | None, variant: str | None) -> ModelInfo:
    transformer, vae = read_json(path, "transformer/config.json"), read_json(path, "vae/config.json")
    channels, latent_channels = transformer.get("in_channels", 16), vae.get("latent_channels", 4)
    if channels != latent_channels:
        raise ModelError(
            f"{path}: the transformer takes {channels} channels, the vae has {latent_channels}; they must be the same"
        )
    factor, patch = factor_of(vae), transformer.get("patch_size", 2)
    if image_size is None:
        image_size = factor * square(path, "transformer/config.json", transformer.get("sample_size", 128))[0]
    largest = factor * patch * transformer.get("pos_embed_max_size", 96)
    if image_size > largest:
        raise ModelError(
            f"{path}: this model makes images of at most {largest} pixels a side, data.image_size is {image_size}; "
            f"the nearest that works: {largest}"
        )
    side = multiple_of(path, image_size, factor * patch) // factor
    text_files(path, _encoders(index), variant)
    return ModelInfo(
        path=path,
        family=FAMILY,
        pipeline=str(index["_class_name"]),
        image_shape=(vae.get("out_channels", 3), side * factor, side * factor),
        latent_shape=(channels, side, side),
        conditioning="prompt",
        num_classes=0,
        null_class=None,
        guidance="cfg",
        digest=digest_of(path, ["transformer", "vae"], variant),
    )


def load(info: ModelInfo, settings: LoadSettings) -> "StableDiffusion3":
    """Read the weights. Raises ModelError when they do not fit the configuration or are not finite."""
    from diffusers import SD3Transformer2DModel

    network = load_network(SD3Transformer2DModel, info, "transformer", dtype=settings.dtype, variant=settings.variant)
    vae = load_autoencoder(info, settings)
    return StableDiffusion3(network, info, settings, vae)


def timing(info: ModelInfo, scheduler: Any, steps: int) -> dict[str, Any] | None:
    """What the pipeline passes to `set_timesteps`: the shift for the image's size, if the scheduler shifts by size."""
    patch = read_json(info.path, "transformer/config.json").get("patch_size", 2)
    _, height, width = info.latent_shape
    return shift_for(scheduler, (height // patch) * (width // patch), max_shift=1.16) or None


def text_digest(info: ModelInfo, variant: str | None) -> str:
    """Hash of what the encoded prompts depend on besides their texts."""
    return text_digest_of(info.path, _encoders(read_json(info.path, "model_index.json")), variant)


def encode_text(
    info: ModelInfo, texts: Sequence[str], variant: str | None, device: torch.device
) -> dict[str, torch.Tensor]:
    """{"tokens": [N, L, D], "pooled": [N, P]} fp32. Raises ModelError, and PromptTooLong.

    Without the T5, tokens are the CLIPs' alone: the zeros that stand for it are added when images are made.
    """
    where: Any = {"variant": variant, "device": device}
    clips = [encode_clip(info.path, name, texts, penultimate=True, **where) for name in _CLIPS]
    tokens, pooled = (torch.cat(parts, dim=-1) for parts in zip(*clips, strict=True))
    if _T5 in _encoders(read_json(info.path, "model_index.json")):
        sentence = encode_t5(info.path, _T5, texts, _T5_TOKENS, **where)
        tokens = torch.cat([F.pad(tokens, (0, sentence.shape[-1] - tokens.shape[-1])), sentence], dim=1)
    return {"tokens": tokens, "pooled": pooled}


def _encoders(index: dict[str, Any]) -> list[str]:
    """The text encoders that the folder has: the T5 may have been left out."""
    return [*_CLIPS, *([_T5] if (index.get(_T5) or [None])[-1] is not None else [])]


class StableDiffusion3(Prompted):
    """The conditioning is {"tokens": [n, tokens, width], "pooled": [n, width]}."""

    embeddings = ("tokens", "pooled")

    def __init__(self, network: Any, info: ModelInfo, settings: LoadSettings, vae: Autoencoder):
        super().__init__(network, info, settings)
        self.vae = vae
        if settings.prompts is not None:
            self.prompts = PromptTable.load(settings.prompts, self.device, self.dtype)
        self.has_t5 = _T5 in _encoders(read_json(info.path, "model_index.json"))

    def condition(self, order: OrderBatch, rows: Rows, guided: bool) -> Conditioning:
        found = prompt_conditioning(order, rows, self.prompts, guided, self.embeddings)
        tokens = found["tokens"].to(self.dtype)
        if not self.has_t5:
            tokens = F.pad(tokens, (0, self.network.config.joint_attention_dim - tokens.shape[-1], 0, _T5_TOKENS))
        return {"tokens": tokens, "pooled": found["pooled"].to(self.dtype)}

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        return self.network(
            hidden_states=x,
            timestep=timestep.expand(len(x)),
            encoder_hidden_states=conditioning["tokens"],
            pooled_projections=conditioning["pooled"],
            return_dict=False,
        )[0]

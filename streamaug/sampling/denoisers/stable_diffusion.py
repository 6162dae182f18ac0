"""Stable Diffusion 1.x and 2.x: latents of a KL autoencoder, conditioned on a prompt's or an inverted embedding.

Models distilled to few steps are among them: Turbo, and latent consistency models, whose UNet is told the guidance
scale (Luo et al. 2023, "Latent Consistency Models").
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

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
    read_class_tokens,
    text_digest_of,
    text_files,
)

__all__ = ["StableDiffusion", "encode_text", "encoder", "inspect", "load", "text_digest"]

FAMILY = "StableDiffusion"
PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "LatentConsistencyModelPipeline",
    "LatentConsistencyModelImg2ImgPipeline",
)
ETA = 0.0
CLASS_TOKENS = True  # prompts may use textual-inversion embeddings

_OTHER_INPUTS = {
    5: "a UNet that takes a depth map besides the latent",
    7: "an upscaler's UNet, which takes a low-resolution image besides the latent",
    8: "a UNet that takes an image to edit besides the latent",
    9: "an inpainting UNet, which takes a mask and a masked image besides the latent",
}
REFUSED = {
    pipeline: f"{_OTHER_INPUTS[channels]}; use a text-to-image model"
    for pipeline, channels in {
        "StableDiffusionDepth2ImgPipeline": 5,
        "StableDiffusionUpscalePipeline": 7,
        "StableDiffusionInstructPix2PixPipeline": 8,
        "StableDiffusionInpaintPipeline": 9,
    }.items()
}


def inspect(path: Path, index: dict[str, Any], image_size: int | None, variant: str | None) -> ModelInfo:
    text_files(path, ["text_encoder"], variant)
    return latent_unet(path, index, image_size, variant, family=FAMILY, added=None)


def latent_unet(
    path: Path,
    index: dict[str, Any],
    image_size: int | None,
    variant: str | None,
    *,
    family: str,
    added: str | None,
) -> ModelInfo:
    """What is known of a folder with a `UNet2DConditionModel` and an autoencoder.

    added: the `addition_embed_type` that the family's UNets have. Raises ModelError for a UNet that takes something
    else besides latent and prompt.
    """
    unet, vae = read_json(path, "unet/config.json"), read_json(path, "vae/config.json")
    channels, predicted = unet.get("in_channels", 4), unet.get("out_channels", 4)
    latent_channels = vae.get("latent_channels", 4)
    if channels != latent_channels:
        what = f": {_OTHER_INPUTS[channels]}" if latent_channels == 4 and channels in _OTHER_INPUTS else ""
        raise ModelError(
            f"{path}: the unet has {channels} input channels{what}; accepted is one with the autoencoder's "
            f"{latent_channels} latent channels, a text-to-image model's"
        )
    if predicted != channels:
        raise ModelError(
            f"{path}: the unet takes {channels} channels and predicts {predicted}; accepted are equal ones"
        )
    for key, wanted in (("addition_embed_type", added), ("class_embed_type", None), ("num_class_embeds", None)):
        if unet.get(key) != wanted:
            raise ModelError(
                f"{path}: unet/config.json has {key} {unet.get(key)!r}, {family} models have {wanted!r}: "
                "it belongs to another pipeline"
            )
    factor = factor_of(vae)
    if image_size is None:
        height, width = square(path, "unet/config.json", unet.get("sample_size"))
    else:
        height = width = multiple_of(path, image_size, factor) // factor
    return ModelInfo(
        path=path,
        family=family,
        pipeline=str(index["_class_name"]),
        image_shape=(vae.get("out_channels", 3), height * factor, width * factor),
        latent_shape=(channels, height, width),
        conditioning="prompt",
        num_classes=0,
        null_class=None,
        guidance="embedded" if unet.get("time_cond_proj_dim") else "cfg",
        digest=digest_of(path, ["unet", "vae"], variant),
    )


def adjust_scheduler(pipeline: str, scheduler: Any) -> Any:
    """The scheduler with what these pipelines override in old configurations, which clamped latents as if pixels."""
    if not pipeline.startswith("StableDiffusion"):
        return scheduler
    wanted = {"steps_offset": 1, "clip_sample": False}
    changed = {key: value for key, value in wanted.items() if scheduler.config.get(key, value) != value}
    if changed:
        scheduler.register_to_config(**changed)
    return scheduler


def text_digest(info: ModelInfo, variant: str | None) -> str:
    """Hash of what the encoded prompts depend on besides their texts."""
    return text_digest_of(info.path, ["text_encoder"], variant)


def encode_text(
    info: ModelInfo,
    texts: Sequence[str],
    variant: str | None,
    device: torch.device,
    class_tokens: Sequence[Path] = (),
) -> dict[str, torch.Tensor]:
    """{"tokens": [N, L, D]} fp32. Raises ModelError, and PromptTooLong rather than cutting a prompt short."""
    width = int(read_json(info.path, "text_encoder/config.json").get("hidden_size", 512))
    vectors = read_class_tokens(class_tokens, {"clip_l": width})["clip_l"]
    tokens, _ = encode_clip(info.path, "text_encoder", texts, variant=variant, device=device, class_tokens=vectors)
    return {"tokens": tokens}


def load(info: ModelInfo, settings: LoadSettings) -> "StableDiffusion":
    """Read the weights. Raises ModelError when they do not fit the configuration or are not finite."""
    return StableDiffusion(*load_parts(info, settings))


def load_parts(
    info: ModelInfo, settings: LoadSettings
) -> tuple[Any, ModelInfo, LoadSettings, Autoencoder, PromptTable | None]:
    """The UNet, the autoencoder and the encoded prompts, if any: what `StableDiffusion` is made from."""
    from diffusers import UNet2DConditionModel

    network = load_network(UNet2DConditionModel, info, "unet", dtype=settings.dtype, variant=settings.variant)
    vae = load_autoencoder(info, settings)
    prompts = None if settings.prompts is None else PromptTable.load(settings.prompts, settings.device, settings.dtype)
    return network, info, settings, vae, prompts


class StableDiffusion(Prompted):
    """The conditioning is {"tokens": [n, L, D]}, and "timestep_cond" [n, d] where the UNet is told the guidance."""

    def __init__(
        self,
        network: Any,
        info: ModelInfo,
        settings: LoadSettings,
        vae: Autoencoder,
        prompts: PromptTable | None,
    ):
        super().__init__(network, info, settings)
        self.vae, self.prompts = vae, prompts
        self._guidance_width = network.config.time_cond_proj_dim

    def condition(self, order: OrderBatch, rows: Rows, guided: bool) -> Conditioning:
        found = prompt_conditioning(order, rows, self.prompts, guided, self.embeddings)
        conditioning = {name: value.to(self.dtype) for name, value in found.items()}
        self._check_width(conditioning["tokens"])
        if self._guidance_width:
            scale = self.told_scale(order, guided)
            conditioning["timestep_cond"] = guidance_embedding(scale, self._guidance_width).to(self.dtype)
        return conditioning

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        return self.network(
            x,
            timestep,
            encoder_hidden_states=conditioning["tokens"],
            timestep_cond=conditioning.get("timestep_cond"),
            return_dict=False,
        )[0]

    def _check_width(self, tokens: torch.Tensor) -> None:
        wanted = self.network.config.cross_attention_dim
        if isinstance(wanted, int) and tokens.shape[-1] != wanted:
            raise ModelError(
                f"the embeddings have {tokens.shape[-1]} values a token, the unet takes {wanted}: they were made by "
                "another model's text encoder or inversion"
            )


def guidance_embedding(scale: torch.Tensor, width: int) -> torch.Tensor:
    """Sines and cosines [n, width] fp32 of guidance scales fp32 [n], where scale 1 is w = 0, no guidance.

    The frequencies are those of a timestep embedding, from 1 to 1/10000, and w counts 1000-fold.
    """
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=scale.device)
    frequencies = torch.exp(steps * -(math.log(10000.0) / (half - 1)))
    angles = (scale.float()[:, None] - 1) * 1000 * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.nn.functional.pad(waves, (0, width % 2))

"""SDXL: Stable Diffusion with two text encoders, a pooled embedding and the image's size among the conditions.

The refiner, which has the second text encoder alone and an aesthetic score in place of the target size, is one too.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from streamaug.errors import ModelError
from streamaug.orders import OrderBatch
from streamaug.sampling.denoisers import stable_diffusion
from streamaug.sampling.denoisers.autoencoder import Autoencoder, encoder
from streamaug.sampling.denoisers.base import Conditioning, LoadSettings, ModelInfo, Rows, read_json
from streamaug.sampling.denoisers.prompts import PromptTable, encode_clip, read_class_tokens, text_digest_of, text_files
from streamaug.sampling.denoisers.stable_diffusion import StableDiffusion, latent_unet, load_parts

__all__ = ["SDXL", "encode_text", "encoder", "inspect", "load", "text_digest"]

FAMILY = "StableDiffusionXL"
PIPELINES = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline")
REFUSED = {
    "StableDiffusionXLInpaintPipeline": stable_diffusion.REFUSED["StableDiffusionInpaintPipeline"],
    "StableDiffusionXLInstructPix2PixPipeline": stable_diffusion.REFUSED["StableDiffusionInstructPix2PixPipeline"],
}
ETA = 0.0
CLASS_TOKENS = True

_CLASS_TOKEN_NAMES = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
# The refiner's conditions on quality, as its pipeline has them by default: wanted, and in the unconditional half.
_AESTHETIC_SCORE, _NULL_AESTHETIC_SCORE = 6.0, 2.5


def inspect(path: Path, index: dict[str, Any], image_size: int | None, variant: str | None) -> ModelInfo:
    text_files(path, _encoders(path, index), variant)
    info = latent_unet(path, index, image_size, variant, family=FAMILY, added="text_time")
    unet = read_json(path, "unet/config.json")
    pooled = int(read_json(path, "text_encoder_2/config.json").get("projection_dim", 512))
    ids = 5 if index.get("requires_aesthetics_score") else 6
    wanted = unet.get("projection_class_embeddings_input_dim")
    width = unet.get("addition_time_embed_dim")
    if not isinstance(width, int) or wanted != ids * width + pooled:
        raise ModelError(
            f"{path}: the unet takes {wanted} values of pooled embedding and sizes, text_encoder_2 and {ids} sizes of "
            f"{width} each give {ids * (width or 0) + pooled}: check requires_aesthetics_score in model_index.json"
        )
    return info


def text_digest(info: ModelInfo, variant: str | None) -> str:
    """Hash of what the encoded prompts depend on besides their texts."""
    index = read_json(info.path, "model_index.json")
    return text_digest_of(info.path, _encoders(info.path, index), variant) + str(null_is_zero(info))


def encode_text(
    info: ModelInfo,
    texts: Sequence[str],
    variant: str | None,
    device: torch.device,
    class_tokens: Sequence[Path] = (),
) -> dict[str, torch.Tensor]:
    """{"tokens": [N, L, D], "pooled": [N, P]} fp32.

    Raises ModelError, and PromptTooLong rather than cutting a prompt short.
    """
    index = read_json(info.path, "model_index.json")
    components = _encoders(info.path, index)
    widths = {
        _CLASS_TOKEN_NAMES[name]: int(read_json(info.path, f"{name}/config.json").get("hidden_size", 512))
        for name in components
    }
    vectors = read_class_tokens(class_tokens, widths)
    hidden, pooled = [], torch.empty(0)
    for name in components:
        tokens, pooled = encode_clip(
            info.path,
            name,
            texts,
            variant=variant,
            device=device,
            penultimate=True,
            class_tokens=vectors[_CLASS_TOKEN_NAMES[name]],
        )
        hidden.append(tokens)
    return {"tokens": torch.cat(hidden, dim=-1), "pooled": pooled}


def null_is_zero(info: ModelInfo) -> bool:
    """Whether, where there is no negative prompt, zeros stand for it."""
    return bool(read_json(info.path, "model_index.json").get("force_zeros_for_empty_prompt", True))


def load(info: ModelInfo, settings: LoadSettings) -> "SDXL":
    """Read the weights. Raises ModelError when they do not fit the configuration or are not finite."""
    return SDXL(*load_parts(info, settings))


class SDXL(StableDiffusion):
    """The conditioning is {"tokens": [n, L, D], "pooled": [n, P], "time_ids": [n, 6]}, and "timestep_cond" [n, d].

    time_ids: the original size (height, width), the crop's top left corner and the target size, all in pixels. The
    model learned from small originals that they are blurred, and targets below its own resolution it never saw (Podell
    et al. 2023, sections 2.2 and 2.3). So images smaller than its own are asked for as if they were of its own size,
    unless the settings say otherwise; the pipelines say the size that is sampled.
    """

    embeddings = ("tokens", "pooled")

    def __init__(
        self,
        network: Any,
        info: ModelInfo,
        settings: LoadSettings,
        vae: Autoencoder,
        prompts: PromptTable | None,
    ):
        super().__init__(network, info, settings, vae, prompts)
        ids = _time_ids(info, network.config.sample_size, settings)
        self._ids, self._null_ids = (torch.tensor([each], dtype=torch.float32, device=self.device) for each in ids)
        self._repeated: dict[tuple[int, bool], torch.Tensor] = {}

    def condition(self, order: OrderBatch, rows: Rows, guided: bool) -> Conditioning:
        return super().condition(order, rows, guided) | {"time_ids": self._time_ids(len(order), guided)}

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        return self.network(
            x,
            timestep,
            encoder_hidden_states=conditioning["tokens"],
            timestep_cond=conditioning.get("timestep_cond"),
            added_cond_kwargs={"text_embeds": conditioning["pooled"], "time_ids": conditioning["time_ids"]},
            return_dict=False,
        )[0]

    def _time_ids(self, size: int, guided: bool) -> torch.Tensor:
        key = size, guided
        if key not in self._repeated:
            ids = self._ids.repeat(size, 1)
            self._repeated[key] = torch.cat([self._null_ids.repeat(size, 1), ids]) if guided else ids
        return self._repeated[key]


def _encoders(path: Path, index: dict[str, Any]) -> list[str]:
    """The text encoders that the pipeline has: both, or the refiner's second one alone."""
    there = [name for name in _CLASS_TOKEN_NAMES if (index.get(name) or [None])[-1] is not None]
    if "text_encoder_2" not in there:
        raise ModelError(f"{path}: model_index.json names no text_encoder_2, which SDXL's pooled embedding comes from")
    return there


def _time_ids(info: ModelInfo, native: Any, settings: LoadSettings) -> tuple[list[float], list[float]]:
    """The size conditions of an image, and those of its unconditional half. native: the UNet's sample_size."""
    sampled, cells = info.image_shape[1:], info.latent_shape[1:]
    own = [native, native] if isinstance(native, int) else native or cells
    size = [max(pixels, pixels * each // cell) for pixels, cell, each in zip(sampled, cells, own, strict=True)]
    original, target = (
        size if side is None else [side, side] for side in (settings.original_size, settings.target_size)
    )
    if read_json(info.path, "model_index.json").get("requires_aesthetics_score"):
        return [*original, 0, 0, _AESTHETIC_SCORE], [*original, 0, 0, _NULL_AESTHETIC_SCORE]
    return [*original, 0, 0, *target], [*original, 0, 0, *target]

"""DeepFloyd IF: a cascade in pixel space, told by T5 tokens; a base model and a super-resolution stage.

The safety checker and the watermarker are no part of sampling and are not loaded.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from streamaug.errors import MissingExtra, ModelError, nearest
from streamaug.orders import OrderBatch
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
from streamaug.sampling.denoisers.prompts import Prompted, PromptTable, prompt_conditioning, text_digest_of, text_files
from streamaug.sampling.denoisers.t5 import encode_t5

FAMILY = "DeepFloydIF"
PIPELINES = ("IFPipeline", "IFImg2ImgPipeline")
UPSCALERS = ("IFSuperResolutionPipeline", "IFImg2ImgSuperResolutionPipeline")
REFUSED = dict.fromkeys(
    UPSCALERS,
    "it is the second stage of a cascade; set model.upscaler to this folder and model.path to that of its base model, "
    f"{' or '.join(PIPELINES)}",
)
ETA = 0.0

UPSCALED = "upscaled"  # the row by which `SuperResolution` is given the noised, enlarged images
NOISING = "image_noising_scheduler"

_TOKENS = 77  # what the pipelines pad a prompt to, and IF was trained with
_PARTS = ("tokenizer", "text_encoder", "unet", "scheduler", "safety_checker", "feature_extractor", "watermarker")
_WITHOUT_INPUTS = (None, "text")  # additional embeddings that need nothing but the tokens


def inspect(path: Path, index: dict[str, Any], image_size: int | None, variant: str | None) -> ModelInfo:
    unet = _unet(path, text_width=_text_width(path, variant))
    channels, classes = unet["in_channels"], unet.get("class_embed_type")
    if channels not in (1, 3) or classes is not None:
        raise ModelError(
            f"{path}: the unet takes {channels} channels and a class embedding of type {classes!r}; accepted are base "
            "models, which take an image's 3 (or 1) and no class; a super-resolution model goes to model.upscaler"
        )
    return _info(path, index, unet, channels, _size(path, unet, image_size), variant)


def inspect_cascade(
    path: Path, index: dict[str, Any], upscaler: Path, image_size: int | None, variant: str | None
) -> ModelInfo:
    """The base model's `inspect` with the second stage's image_shape, and with `upscaler` set to that stage.

    image_size: of the second stage's images; the base makes them smaller by as much as the two models were trained
    with. Raises ModelError also when the two do not belong together.
    """
    base = inspect(path, index, None, variant)
    upscaler_index = read_json(upscaler, "model_index.json")
    name = str(upscaler_index.get("_class_name"))
    if name not in UPSCALERS:
        raise ModelError(
            f"model.upscaler {upscaler}: the pipeline {name!r} is no upscaler{nearest(name, UPSCALERS)}; accepted: "
            f"{', '.join(UPSCALERS)}"
        )
    unet = _unet(upscaler, text_width=_text_width(path, variant))
    channels, classes, noising = base.image_shape[0], unet.get("class_embed_type"), _noising_digest(upscaler)
    if unet["in_channels"] != 2 * channels or classes != "timestep":
        raise ModelError(
            f"model.upscaler {upscaler}: the unet takes {unet['in_channels']} channels and a class embedding of type "
            f"{classes!r}; accepted after {path} is one that takes {2 * channels} channels and 'timestep'"
        )
    factor = _factor(base, square(upscaler, "unet/config.json", unet.get("sample_size")), upscaler)
    height, width = (side * factor for side in base.image_shape[1:])
    if image_size is not None:
        base_unet = read_json(path, "unet/config.json")
        multiple = math.lcm(factor * _multiple(base_unet), _multiple(unet))
        height = width = multiple_of(path, image_size, multiple)
    second = _info(upscaler, upscaler_index, unet, channels, (height, width), variant)
    both = hashlib.sha256(f"{base.digest} {second.digest} {noising}".encode()).hexdigest()[:16]
    latent_shape = channels, height // factor, width // factor
    return replace(base, image_shape=second.image_shape, latent_shape=latent_shape, upscaler=second, digest=both)


def _unet(path: Path, *, text_width: int) -> dict[str, Any]:
    """unet/config.json. Raises ModelError for a UNet that is told other things than an IF model is."""
    unet = read_json(path, "unet/config.json")
    channels = unet.setdefault("in_channels", 4)
    latent = channels // 2 if unet.get("class_embed_type") else channels
    predicted, added = unet.get("out_channels", 4), unet.get("addition_embed_type")
    if predicted not in (latent, 2 * latent) or added not in _WITHOUT_INPUTS:
        raise ModelError(
            f"{path}: the unet takes {channels} channels, predicts {predicted} and has addition_embed_type {added!r}; "
            f"accepted is one that predicts {latent}, or {2 * latent} with its variance, and has 'text'"
        )
    width = unet.get("encoder_hid_dim") or unet.get("cross_attention_dim")
    if width != text_width:
        raise ModelError(
            f"{path}: the unet takes embeddings of {width} values a token, the base model's text encoder makes "
            f"{text_width}: they are parts of different models"
        )
    return unet


def _text_width(path: Path, variant: str | None) -> int:
    text_files(path, ["text_encoder"], variant)
    return int(read_json(path, "text_encoder/config.json").get("d_model", 512))


def _size(path: Path, unet: dict[str, Any], image_size: int | None) -> tuple[int, int]:
    if image_size is None:
        return square(path, "unet/config.json", unet.get("sample_size"))
    side = multiple_of(path, image_size, _multiple(unet))
    return side, side


def _multiple(unet: dict[str, Any]) -> int:
    """What the sides are multiples of: every level but the last halves them."""
    return 2 ** (len(unet.get("block_out_channels", [0])) - 1)


def _factor(base: ModelInfo, native: tuple[int, int], upscaler: Path) -> int:
    """How many times larger than the base model's the upscaler's images are."""
    _, height, width = base.image_shape
    factor = native[0] // height
    if factor < 1 or native != (height * factor, width * factor):
        raise ModelError(
            f"model.upscaler {upscaler}: makes images of {native[0]}x{native[1]} pixels, {base.path} of "
            f"{height}x{width}; accepted are whole multiples of that, such as {4 * height}x{4 * width}"
        )
    return factor


def _info(
    path: Path,
    index: dict[str, Any],
    unet: dict[str, Any],
    channels: int,
    size: tuple[int, int],
    variant: str | None,
) -> ModelInfo:
    shape = (channels, *size)
    return ModelInfo(
        path=path,
        family=FAMILY,
        pipeline=str(index["_class_name"]),
        image_shape=shape,
        latent_shape=shape,
        conditioning="prompt",
        num_classes=0,
        null_class=None,
        guidance="cfg",
        digest=digest_of(path, ["unet"], variant),
    )


def _noising_digest(path: Path) -> str:
    config = read_json(path, f"{NOISING}/scheduler_config.json")
    return hashlib.sha256(repr(sorted(config.items())).encode()).hexdigest()


def encoder(info: ModelInfo, device: torch.device, variant: str | None = None) -> Callable[[np.ndarray], torch.Tensor]:
    """A function of uint8 [n, C, H, W] to the base model's latents fp32 [n, c, h, w]: the images, area-averaged."""

    def encode(images: np.ndarray) -> torch.Tensor:
        pixels = torch.from_numpy(images).float().div_(127.5).sub_(1.0)
        return F.interpolate(pixels, info.latent_shape[1:], mode="area")

    return encode


def text_digest(info: ModelInfo, variant: str | None) -> str:
    """Hash of what the encoded prompts depend on besides their texts."""
    return text_digest_of(info.path, ["text_encoder"], variant)


def cleaned(info: ModelInfo, texts: Sequence[str]) -> list[str]:
    """The texts as the pipeline tokenizes them: lowercased, and rid of what captions scraped from the web have in them.

    By the pipeline's own method, which only lowercases and says so where beautifulsoup4 or ftfy is not installed.
    Raises MissingExtra.
    """
    import diffusers

    cls = getattr(diffusers, info.pipeline)
    try:
        without_weights = cls(**dict.fromkeys(_PARTS), requires_safety_checker=False)
    except ImportError:  # diffusers has a double of the class where there is no transformers
        raise MissingExtra("transformers", "text") from None
    return without_weights._text_preprocessing(list(texts), clean_caption=True)


def encode_text(
    info: ModelInfo, texts: Sequence[str], variant: str | None, device: torch.device
) -> dict[str, torch.Tensor]:
    """{"tokens": [N, L, D]} fp32, for both stages, of `cleaned` texts. Raises ModelError, and PromptTooLong."""
    return {"tokens": encode_t5(info.path, "text_encoder", texts, _TOKENS, variant=variant, device=device, masked=True)}


def load(info: ModelInfo, settings: LoadSettings) -> "Base":
    """The base model's weights. Raises ModelError when they do not fit the configuration or are not finite."""
    prompts = None if settings.prompts is None else PromptTable.load(settings.prompts, settings.device, settings.dtype)
    return Base(_network(info, settings), info, settings, prompts)


def load_upscaler(base: "Base", noise_level: int) -> "SuperResolution":
    """The second stage of a base model's cascade, run like it and told the same prompts. Raises ModelError."""
    assert base.info is not None and base.info.upscaler is not None
    network = _network(base.info.upscaler, base.settings)
    return SuperResolution(network, base.info.upscaler, base.settings, base.prompts, noise_level)


def _network(info: ModelInfo, settings: LoadSettings) -> Any:
    from diffusers import UNet2DConditionModel

    return load_network(UNet2DConditionModel, info, "unet", dtype=settings.dtype, variant=settings.variant)


class Base(Prompted):
    """The conditioning is {"tokens": [n, L, D]}."""

    def __init__(self, network: Any, info: ModelInfo, settings: LoadSettings, prompts: PromptTable | None):
        super().__init__(network, info, settings)
        self.prompts = prompts
        self.learned_variance = network.config.out_channels == 2 * info.latent_shape[0]

    def condition(self, order: OrderBatch, rows: Rows, guided: bool) -> Conditioning:
        found = prompt_conditioning(order, rows, self.prompts, guided, self.embeddings)
        return {"tokens": found["tokens"].to(self.dtype)}

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        return self.network(x, timestep, encoder_hidden_states=conditioning["tokens"], return_dict=False)[0]


class SuperResolution(Base):
    """The conditioning is {"tokens": [n, L, D], "upscaled": [n, C, H, W], "noise_level": int64 [n]}.

    The enlarged images, noised to `noise_level`, come as the row UPSCALED, [B, C, H, W]. The network sees them beside
    the latent as they are: only the latent is scaled for solvers that scale the network's input.
    """

    def __init__(
        self, network: Any, info: ModelInfo, settings: LoadSettings, prompts: PromptTable | None, noise_level: int
    ):
        super().__init__(network, info, settings, prompts)
        self.noise_level = noise_level

    def condition(self, order: OrderBatch, rows: Rows, guided: bool) -> Conditioning:
        others = {name: value for name, value in rows.items() if name != UPSCALED}
        conditioning = super().condition(order, others, guided)
        upscaled = rows[UPSCALED].to(self.dtype)
        conditioning["upscaled"] = torch.cat([upscaled, upscaled]) if guided else upscaled
        size = len(conditioning["upscaled"])
        conditioning["noise_level"] = torch.full((size,), self.noise_level, device=self.device)
        return conditioning

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        return self.network(
            torch.cat([x, conditioning["upscaled"]], dim=1),
            timestep,
            encoder_hidden_states=conditioning["tokens"],
            class_labels=conditioning["noise_level"],
            return_dict=False,
        )[0]

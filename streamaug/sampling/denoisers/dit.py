"""DiT: latents, a class label, and a null class of the model's own for classifier-free guidance."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from streamaug.errors import ModelError
from streamaug.orders import OrderBatch
from streamaug.sampling.denoisers.autoencoder import Autoencoder, encoder, factor_of, load_autoencoder
from streamaug.sampling.denoisers.base import (
    Conditioning,
    Denoiser,
    LoadSettings,
    ModelInfo,
    Rows,
    digest_of,
    load_network,
    read_json,
    square,
)

__all__ = ["DiT", "encoder", "inspect", "load"]

FAMILY = "DiT"
PIPELINES = ("DiTPipeline",)


def inspect(path: Path, index: dict[str, Any], image_size: int | None, variant: str | None) -> ModelInfo:
    transformer, vae = read_json(path, "transformer/config.json"), read_json(path, "vae/config.json")
    height, width = square(path, "transformer/config.json", transformer.get("sample_size", 32))
    channels, predicted = transformer.get("in_channels", 4), transformer.get("out_channels")
    if channels != vae.get("latent_channels", 4) or predicted not in (None, channels, 2 * channels):
        raise ModelError(
            f"{path}: the transformer takes {channels} channels and predicts {predicted or channels}, the vae has "
            f"{vae.get('latent_channels', 4)}; accepted are models that take the vae's channels and predict as many, "
            "or twice as many (a learned variance)"
        )
    null_class = transformer.get("num_embeds_ada_norm", 1000)
    factor = factor_of(vae)
    return ModelInfo(
        path=path,
        family=FAMILY,
        pipeline=str(index["_class_name"]),
        image_shape=(vae.get("out_channels", 3), height * factor, width * factor),
        latent_shape=(channels, height, width),
        conditioning="class",
        num_classes=null_class + 1,
        null_class=null_class,
        guidance="cfg",
        digest=digest_of(path, ["transformer", "vae"], variant),
    )


def load(info: ModelInfo, settings: LoadSettings) -> "DiT":
    """Read the weights. Raises ModelError when they do not fit the configuration or are not finite."""
    from diffusers import DiTTransformer2DModel

    network = load_network(DiTTransformer2DModel, info, "transformer", dtype=settings.dtype, variant=settings.variant)
    vae = load_autoencoder(info, settings)
    return DiT(network, info, settings, vae)


class DiT(Denoiser):
    """The conditioning is {"class_labels": int64 [n]}; the unconditional half has the null class."""

    def __init__(self, network: Any, info: ModelInfo, settings: LoadSettings, vae: Autoencoder):
        super().__init__(network, info, settings)
        config = network.config
        self.learned_variance = config.out_channels == 2 * config.in_channels
        self.vae = vae
        self.null_class = config.num_embeds_ada_norm if settings.null_class is None else settings.null_class

    def condition(self, order: OrderBatch, rows: Rows, guided: bool) -> Conditioning:
        labels = torch.from_numpy(np.ascontiguousarray(order.images["label"])).to(self.device)
        if guided:
            labels = torch.cat([torch.full_like(labels, self.null_class), labels])
        return {"class_labels": labels}

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        return self.network(x, timestep.expand(len(x)), conditioning["class_labels"], return_dict=False)[0]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(latents)

"""UNet2DModel: pixels, unconditional or with a class label (DDPM, DDIM, score-based and consistency pipelines)."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from streamaug.errors import ModelError
from streamaug.orders import OrderBatch
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

FAMILY = "UNet2DModel"
PIPELINES = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline", "ConsistencyModelPipeline")


def inspect(path: Path, index: dict[str, Any], image_size: int | None, variant: str | None) -> ModelInfo:
    unet = read_json(path, "unet/config.json")
    height, width = square(path, "unet/config.json", unet.get("sample_size"))
    channels, predicted = unet.get("in_channels", 3), unet.get("out_channels", 3)
    if channels != predicted:
        raise ModelError(
            f"{path}: the unet takes {channels} channels and predicts {predicted} (a learned variance?); "
            "accepted are models that predict as many channels as they take"
        )
    classes = unet.get("num_class_embeds") or 0
    shape = (channels, height, width)
    return ModelInfo(
        path=path,
        family=FAMILY,
        pipeline=str(index["_class_name"]),
        image_shape=shape,
        latent_shape=shape,
        conditioning="class" if classes else "none",
        num_classes=classes,
        null_class=None,
        guidance="cfg" if classes else "none",
        digest=digest_of(path, ["unet"], variant),
    )


def load(info: ModelInfo, settings: LoadSettings) -> "UNet2D":
    """Read the weights. Raises ModelError when they do not fit the configuration or are not finite."""
    from diffusers import UNet2DModel

    network = load_network(UNet2DModel, info, "unet", dtype=settings.dtype, variant=settings.variant)
    return UNet2D(network, info, settings)


class UNet2D(Denoiser):
    """The conditioning is {"class_labels": int64 [n]}, or empty."""

    @property
    def guidance(self):
        return "cfg" if self.network.config.num_class_embeds else "none"

    def condition(self, order: OrderBatch, rows: Rows, guided: bool) -> Conditioning:
        if self.guidance == "none":
            return {}
        labels = torch.from_numpy(np.ascontiguousarray(order.images["label"])).to(self.device)
        if guided:
            null_class = self.settings.null_class
            if null_class is None:
                raise ModelError("classifier-free guidance needs the class that means 'no class': set model.null_class")
            labels = torch.cat([torch.full_like(labels, null_class), labels])
        return {"class_labels": labels}

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        return self.network(x, timestep, class_labels=conditioning.get("class_labels"), return_dict=False)[0]

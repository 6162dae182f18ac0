"""UNet2DModel: pixels, unconditional or with a class label (DDPM, DDIM, score-based and consistency pipelines)."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

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
FEATURES = True  # `UNet2D.features`
_FEATURE_SIDE = 4


def inspect(path: Path, index: dict[str, Any], image_size: int | None, variant: str | None) -> ModelInfo:
    unet = read_json(path, "unet/config.json")
    height, width = square(path, "unet/config.json", unet.get("sample_size"))
    channels, predicted = unet.get("in_channels", 3), unet.get("out_channels", 3)
    if predicted not in (channels, 2 * channels):
        raise ModelError(
            f"{path}: the unet takes {channels} channels and predicts {predicted}; accepted are models that predict as "
            "many channels as they take, or twice as many (a learned variance)"
        )
    if unet.get("class_embed_type") is not None:
        raise ModelError(
            f"{path}: unet/config.json has class_embed_type {unet['class_embed_type']!r}; accepted are class labels: "
            "class_embed_type null, with num_class_embeds"
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

    def __init__(self, network: Any, info: ModelInfo | None, settings: LoadSettings):
        super().__init__(network, info, settings)
        self.learned_variance = network.config.out_channels == 2 * network.config.in_channels

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

    @property
    def feature_size(self) -> int:
        """How many features `features` returns for an image."""
        config = self.network.config
        _, height, width = self.info.latent_shape if self.info else (0, config.sample_size, config.sample_size)
        halvings = len(config.block_out_channels) - 1
        sides = (min(_FEATURE_SIDE, -(-side // 2**halvings)) for side in (height, width))
        return config.block_out_channels[-1] * math.prod(sides)

    def features(self, images: torch.Tensor, timestep: float) -> torch.Tensor:
        """The middle block's output for images [B, C, H, W] in [-1, 1], pooled to at most 4x4: [B, feature_size]."""
        found: list[torch.Tensor] = []

        def keep(module: Any, given: Any, output: torch.Tensor) -> None:
            found.append(output)
            raise _Reached

        self.forget()
        hook = self.network.mid_block.register_forward_hook(keep)
        try:
            # Uncompiled: the upper half of the network is not run.
            self.network.forward(images.to(self.dtype), timestep, class_labels=self._any_class(len(images)))
        except _Reached:
            pass
        finally:
            hook.remove()
            self.forget()
        side = min(_FEATURE_SIDE, *found[0].shape[2:])
        return F.adaptive_avg_pool2d(found[0], side).flatten(1)

    def _any_class(self, size: int) -> torch.Tensor | None:
        """The null class, or class 0, for a network that must be told one."""
        if self.guidance == "none":
            return None
        return torch.full((size,), self.settings.null_class or 0, device=self.device)


class _Reached(Exception):
    """The features are there: leave the forward pass."""

"""UNet2DModel: pixels, unconditional or with a class label (DDPM, DDIM, score-based and consistency pipelines)."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from streamaug.errors import ModelError
from streamaug.orders import OrderBatch
from streamaug.sampling.denoisers.base import (
    NULL,
    Conditioning,
    Denoiser,
    LoadSettings,
    ModelInfo,
    Rows,
    by_rows,
    digest_of,
    load_network,
    mixed,
    mixed_rows,
    read_json,
    row_halves,
    square,
)

FAMILY = "UNet2DModel"
PIPELINES = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline", "ConsistencyModelPipeline")
FEATURES = True  # `UNet2D.features`
OWN_SETTINGS = "streamaug.json"  # in the folder of a prior with classes: {"null_class": the label of "no class"}
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
        null_class=_null_class(path, classes),
        guidance="cfg" if classes else "none",
        digest=digest_of(path, ["unet"], variant, [own] if (own := path / OWN_SETTINGS).is_file() else ()),
    )


def adjust_scheduler(pipeline: str, scheduler: Any) -> Any:
    """The scheduler as the pipelines make it that are named after one: of that class, from the configuration."""
    import diffusers

    wanted = {"DDIMPipeline": "DDIMScheduler", "PNDMPipeline": "PNDMScheduler"}.get(pipeline)
    if wanted is None or type(scheduler).__name__ == wanted:
        return scheduler
    return getattr(diffusers, wanted).from_config(scheduler.config)


def _null_class(path: Path, classes: int) -> int | None:
    if not (path / OWN_SETTINGS).is_file():
        return None
    null_class = read_json(path, OWN_SETTINGS).get("null_class")
    if not (isinstance(null_class, int) and 0 <= null_class < classes):
        raise ModelError(
            f"{path / OWN_SETTINGS}: null_class is {null_class!r}, the unet has {classes} classes; accepted: a whole "
            f"number from 0 to {classes - 1}, or no such file"
        )
    return null_class


def load(info: ModelInfo, settings: LoadSettings) -> "UNet2D":
    """Read the weights. Raises ModelError when they do not fit the configuration or are not finite."""
    from diffusers import UNet2DModel

    network = load_network(UNet2DModel, info, "unet", dtype=settings.dtype, variant=settings.variant)
    return UNet2D(network, info, settings)


class LabelOrVector(nn.Module):
    """In the place of a table of class embeddings: looks up labels int [n], and takes vectors [n, d] as they are."""

    def __init__(self, table: nn.Embedding):
        super().__init__()
        self.table = table

    def forward(self, told: torch.Tensor) -> torch.Tensor:
        return told if told.is_floating_point() else self.table(told)


class UNet2D(Denoiser):
    """The conditioning is {"class_labels": int64 [n]}, {"class_embedding": [n, d]} for bank rows, or empty."""

    def __init__(self, network: Any, info: ModelInfo | None, settings: LoadSettings):
        if isinstance(network.class_embedding, nn.Embedding):
            network.class_embedding = LabelOrVector(network.class_embedding)
        super().__init__(network, info, settings)
        self.learned_variance = network.config.out_channels == 2 * network.config.in_channels

    @property
    def guidance(self):
        return "cfg" if self.network.config.num_class_embeds else "none"

    def condition(self, order: OrderBatch, rows: Rows, guided: bool) -> Conditioning:
        if self.guidance == "none":
            return {}
        if by_rows(order):
            return self._told_vectors(row_halves(rows, ("class_embedding",), guided)["class_embedding"])
        null_class = self.settings.null_class
        if guided and null_class is None:
            raise ModelError("classifier-free guidance needs the class that means 'no class': set model.null_class")
        if mixed(order):
            told = mixed_rows(order, self.class_rows)
            told[f"{NULL}class_embedding"] = self.network.class_embedding.table.weight[null_class or 0]
            return self._told_vectors(row_halves(told, ("class_embedding",), guided)["class_embedding"])
        labels = torch.from_numpy(np.ascontiguousarray(order.images["label"])).to(self.device)
        if guided:
            labels = torch.cat([torch.full_like(labels, null_class or 0), labels])
        return {"class_labels": labels}

    def _told_vectors(self, vectors: torch.Tensor) -> Conditioning:
        width = self.network.class_embedding.table.embedding_dim
        if vectors.shape[1:] != (width,):
            raise ModelError(
                f"the bank's class embeddings are {list(vectors.shape[1:])}, the unet takes [{width}]: they were "
                "inverted with another model"
            )
        return {"class_embedding": vectors.to(self.dtype)}

    def class_rows(self, labels: np.ndarray) -> dict[str, torch.Tensor]:
        """{"class_embedding": [n, d]}."""
        if self.guidance == "none":
            raise ModelError("the unet is told no class, so there is no class embedding")
        return {"class_embedding": self.network.class_embedding.table(torch.from_numpy(labels).to(self.device))}

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        told = conditioning.get("class_embedding", conditioning.get("class_labels"))
        return self.network(x, timestep, class_labels=told, return_dict=False)[0]

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

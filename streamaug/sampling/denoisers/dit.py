"""DiT: latents, a class label, and a null class of the model's own for classifier-free guidance."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from streamaug.errors import ModelError
from streamaug.orders import OrderBatch
from streamaug.sampling.denoisers.autoencoder import Autoencoder, encoder, factor_of, load_autoencoder
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
        label_names=_label_names(index.get("id2label")),
    )


def _label_names(id2label: Any) -> tuple[str, ...]:
    """The names of labels 0, 1, ... from model_index.json's id2label; none when it does not name them all."""
    named = id2label if isinstance(id2label, dict) else {}
    in_order = [named.get(str(label)) for label in range(len(named))]
    return () if None in in_order else tuple(str(name) for name in in_order)


def load(info: ModelInfo, settings: LoadSettings) -> "DiT":
    """Read the weights. Raises ModelError when they do not fit the configuration or are not finite."""
    from diffusers import DiTTransformer2DModel

    network = load_network(DiTTransformer2DModel, info, "transformer", dtype=settings.dtype, variant=settings.variant)
    vae = load_autoencoder(info, settings)
    return DiT(network, info, settings, vae)


class LabelOrVector(nn.Module):
    """In the place of one block's label table: looks up labels int [n], and takes its own of vectors [n, blocks, d]."""

    def __init__(self, labels: Any, block: int):
        super().__init__()
        self.labels, self.block = labels, block

    @property
    def table(self) -> torch.Tensor:
        return self.labels.embedding_table.weight

    def forward(self, told: torch.Tensor) -> torch.Tensor:
        return told[:, self.block] if told.is_floating_point() else self.labels(told)


class DiT(Denoiser):
    """The conditioning is {"class_labels": int64 [n]}, or {"class_embedding": [n, blocks, d]} for bank rows.

    The unconditional half has the null class, or the rows' mean. Each block has label embeddings of its own.
    """

    def __init__(self, network: Any, info: ModelInfo, settings: LoadSettings, vae: Autoencoder):
        embedders = [block.norm1.emb for block in network.transformer_blocks]
        for position, embedder in enumerate(embedders):
            embedder.class_embedder = LabelOrVector(embedder.class_embedder, position)
        self._embedders = embedders
        super().__init__(network, info, settings)
        config = network.config
        self.learned_variance = config.out_channels == 2 * config.in_channels
        self.vae = vae
        self.null_class = config.num_embeds_ada_norm if settings.null_class is None else settings.null_class

    def condition(self, order: OrderBatch, rows: Rows, guided: bool) -> Conditioning:
        if by_rows(order):
            return self._told_vectors(row_halves(rows, ("class_embedding",), guided)["class_embedding"])
        if mixed(order):
            told = mixed_rows(order, self.class_rows)
            null = [each.class_embedder.table[self.null_class] for each in self._embedders]
            told[f"{NULL}class_embedding"] = torch.stack(null)
            return self._told_vectors(row_halves(told, ("class_embedding",), guided)["class_embedding"])
        labels = self._labels(order.images["label"])
        if guided:
            labels = torch.cat([torch.full_like(labels, self.null_class), labels])
        return {"class_labels": labels}

    def _labels(self, classes: np.ndarray) -> torch.Tensor:
        """The model's labels of the data's classes, int64 [n]."""
        ids = None if self.info is None else self.info.class_ids
        return torch.from_numpy(np.ascontiguousarray(classes) if ids is None else np.array(ids)[classes]).to(
            self.device
        )

    def _told_vectors(self, vectors: torch.Tensor) -> Conditioning:
        wanted = len(self._embedders), self._embedders[0].class_embedder.table.shape[1]
        if vectors.shape[1:] != wanted:
            raise ModelError(
                f"the bank's class embeddings are {list(vectors.shape[1:])}, the transformer takes {list(wanted)}: "
                "they were inverted with another model"
            )
        return {"class_embedding": vectors.to(self.dtype)}

    def class_rows(self, labels: np.ndarray) -> dict[str, torch.Tensor]:
        """{"class_embedding": [n, blocks, d]}."""
        at = self._labels(labels)
        tables = [each.class_embedder.table[at] for each in self._embedders]
        return {"class_embedding": torch.stack(tables, dim=1)}

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        told = conditioning["class_embedding" if "class_embedding" in conditioning else "class_labels"]
        return self.network(x, timestep.expand(len(x)), told, return_dict=False)[0]

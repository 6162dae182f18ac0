"""The encode method: a row is the image itself or its code under the model's autoencoder; orders noise it."""

import os
from collections.abc import Callable

import numpy as np
import torch

from streamaug.bank import BankPlan, BankWriter, LatentBank, open_if_current
from streamaug.config import BankConfig
from streamaug.data import ImageSet

GROUP_ROWS = 64

Encoder = Callable[[np.ndarray], torch.Tensor]


def invert(
    images: ImageSet,
    path: str | os.PathLike,
    *,
    config: BankConfig,
    model_digest: str,
    encode: Encoder | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LatentBank:
    """Write the bank of `images` to the folder `path`, or open it when it is already there.

    Goes on where an interrupted run stopped, and redoes only what changed images, model or settings affect.

    encode: uint8 [64, C, H, W] to latents [64, c, h, w], always 64 at a time; None is for models that work
    on pixels (`pixels_to_latent`). model_digest: identifies the model's weights. progress: called with (rows
    done, rows in all), first with what an earlier run left. Raises BankError.
    """
    plan = BankPlan(
        labels=images.labels,
        source_hashes=images.hashes,
        source_names=images.sources,
        class_names=images.class_names,
        meta={
            "method": "encode",
            "model": model_digest,
            "image_shape": list(images.image_shape),
            "value_range": [-1.0, 1.0] if encode is None else None,
        },
        dtype=config.dtype,
        shard_rows=config.shard_rows,
        group_rows=GROUP_ROWS,
    )
    report = progress or (lambda done, total: None)
    bank = open_if_current(path, plan)
    if bank is not None:
        report(bank.num_rows, bank.num_rows)
        return bank
    with BankWriter(path, plan) as writer:
        done = writer.done_rows
        report(done, plan.num_rows)
        for group in writer.pending():
            writer.put(group, {"latent": (encode or pixels_to_latent)(images.images[group.padded])})
            done += len(group.rows)
            report(done, plan.num_rows)
        return writer.finish()


def pixels_to_latent(images: np.ndarray) -> torch.Tensor:
    """uint8 [n, C, H, W] to float32 in [-1, 1]."""
    return torch.from_numpy(images).float().div_(127.5).sub_(1.0)


def latent_to_pixels(latent: torch.Tensor) -> torch.Tensor:
    """The uint8 pixels of a pixel latent: those `pixels_to_latent` was given, whatever dtype stored it."""
    return latent.float().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)

"""A small diffusion prior fitted to the user's own images, for when they bring no model.

It is trained without labels, saved as an ordinary diffusers folder, and reused while images and settings stay the
same. v-prediction (Salimans & Ho 2022) on a squared-cosine schedule (Nichol & Dhariwal 2021), with an exponential
moving average of the weights.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError

from streamaug.config import PriorConfig
from streamaug.data import ImageSet
from streamaug.errors import ModelError
from streamaug.training.trainer import one_cycle

TRAIN_TIMESTEPS = 1000


def prior_digest(images: ImageSet, config: PriorConfig) -> str:
    """What a prior is named by: the pixels it saw, whatever their order, and how it was trained."""
    described = json.dumps(config.model_dump(mode="json"), sort_keys=True) + "".join(sorted(images.hashes))
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def build_unet(image_shape: tuple[int, int, int], config: PriorConfig) -> Any:
    """A UNet2DModel for images [C, H, W] with attention at its lower resolutions and random weights."""
    from diffusers import UNet2DModel

    channels, height, width = image_shape
    levels = len(config.channels)
    multiple = 2 ** (levels - 1)
    if height % multiple or width % multiple:
        raise ModelError(
            f"a prior with {levels} levels halves the image {levels - 1} times, and {height}x{width} is not a multiple "
            f"of {multiple}; set data.image_size to {max(height // multiple, 1) * multiple}"
        )
    return UNet2DModel(
        sample_size=height if height == width else (height, width),
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=tuple(config.channels),
        down_block_types=("DownBlock2D",) + ("AttnDownBlock2D",) * (levels - 1),
        up_block_types=("AttnUpBlock2D",) * (levels - 1) + ("UpBlock2D",),
        norm_num_groups=8,
        attention_head_dim=16,
    )


def train_prior(
    images: ImageSet,
    config: PriorConfig,
    path: Path,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Train on the images (their labels are not looked at) and save a diffusers DDIMPipeline folder at `path`.

    The folder appears whole or not at all. Raises ModelError when it cannot be written.
    """
    from diffusers import DDIMPipeline, DDIMScheduler

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        unet = build_unet(images.image_shape, config).to(memory_format=torch.channels_last)
        scheduler = DDIMScheduler(
            num_train_timesteps=TRAIN_TIMESTEPS,
            beta_schedule="squaredcos_cap_v2",
            prediction_type="v_prediction",
            timestep_spacing="trailing",
            clip_sample=True,
        )
        _fit(unet, scheduler, images, config, progress)
    save_atomically(DDIMPipeline(unet.to(memory_format=torch.contiguous_format), scheduler), path)
    return path


def _fit(
    unet: Any,
    scheduler: Any,
    images: ImageSet,
    config: PriorConfig,
    progress: Callable[[int, int], None] | None,
) -> None:
    pixels = torch.from_numpy(images.images).float() / 127.5 - 1
    weights = list(unet.parameters())
    average = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(weights, lr=config.lr, weight_decay=0.01)
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * one_cycle(step / config.steps, warm=0.03)
        clean = pixels[torch.randint(len(pixels), (config.batch_size,))]
        noise = torch.randn_like(clean)
        t = torch.randint(TRAIN_TIMESTEPS, (config.batch_size,))
        predicted = unet(scheduler.add_noise(clean, noise, t), t, return_dict=False)[0]
        loss = F.mse_loss(predicted, scheduler.get_velocity(clean, noise, t))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        # A short memory at first, so that the average forgets the random start.
        decay = min(0.999, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [weight.detach() for weight in weights], 1 - decay)
        if progress:
            progress(step + 1, config.steps)
    if not np.isfinite(loss.item()):
        raise ModelError(f"training the prior diverged (loss {loss.item()}); lower prior.lr")
    with torch.no_grad():
        for weight, averaged in zip(weights, average, strict=True):
            weight.copy_(averaged)


def save_atomically(pipeline: Any, path: Path) -> None:
    """Save a diffusers pipeline so that `path` holds the old model or the whole new one, whatever happens."""
    temporary = old = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        temporary.chmod(0o755)
        pipeline.save_pretrained(temporary, safe_serialization=True)
        old = temporary.with_suffix(".old")
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{path}: the model cannot be written: {error}; "
            "free some space, or set `cache` to a folder that can be written"
        ) from None
    finally:
        if old is not None and old.exists() and not path.exists():
            os.replace(old, path)
        for leftover in (temporary, old):
            if leftover is not None:
                shutil.rmtree(leftover, ignore_errors=True)

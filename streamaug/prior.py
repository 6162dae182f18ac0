"""A small diffusion prior fitted to the user's own images, for when they bring no model.

It is trained without labels or, with `prior.labels`, told the classes; saved as an ordinary diffusers folder, and
reused while images and settings stay the same. v-prediction (Salimans & Ho 2022) on a squared-cosine schedule (Nichol
& Dhariwal 2021), with an exponential moving average of the weights.
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
from streamaug.sampling.denoisers.unet2d import OWN_SETTINGS
from streamaug.training.trainer import one_cycle

TRAIN_TIMESTEPS = 1000
_DROPPED = 0.1  # share of the labelled images shown without their label, as in classifier-free guidance


def prior_digest(images: ImageSet, config: PriorConfig, labels: np.ndarray | None = None) -> str:
    """What a prior is named by: the images it saw, whatever their order, and how it was trained.

    labels: int64 [N], -1 unknown; they count only with `prior.labels`, which then needs them. Raises ModelError.
    """
    settings = config.model_dump(mode="json", exclude=None if config.labels else {"labels"})
    seen = images.hashes
    if config.labels:
        known = _checked(labels, len(images))
        seen = [f"{each} {label}" for each, label in zip(seen, known.tolist(), strict=True)]
    described = json.dumps(settings, sort_keys=True) + "".join(sorted(seen))
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def build_unet(image_shape: tuple[int, int, int], config: PriorConfig, num_classes: int = 0) -> Any:
    """A UNet2DModel for images [C, H, W] with attention at its lower resolutions and random weights.

    num_classes: 0 for one that is told no label; else it has one class embedding more, the last: "no class".
    """
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
        num_class_embeds=num_classes + 1 if num_classes else None,
    )


def train_prior(
    images: ImageSet,
    config: PriorConfig,
    path: Path,
    *,
    labels: np.ndarray | None = None,
    num_classes: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Train on the images and save a diffusers DDIMPipeline folder at `path`.

    labels: int64 [N], -1 unknown, and num_classes: looked at only with `prior.labels`, which needs both. The folder
    then says which class means "no class" (`null_class`, the last), and inspecting it finds that. It appears whole or
    not at all. Raises ModelError when it cannot be written, and for labels that are missing or no classes.
    """
    from diffusers import DDIMPipeline, DDIMScheduler

    null_class = num_classes if config.labels else None
    told = None
    if config.labels:
        told = torch.from_numpy(_checked(labels, len(images), num_classes))
        told = torch.where(told < 0, num_classes, told)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        unet = build_unet(images.image_shape, config, null_class or 0).to(memory_format=torch.channels_last)
        scheduler = DDIMScheduler(
            num_train_timesteps=TRAIN_TIMESTEPS,
            beta_schedule="squaredcos_cap_v2",
            prediction_type="v_prediction",
            timestep_spacing="trailing",
            clip_sample=True,
        )
        _fit(unet, scheduler, images, told, config, progress)
    pipeline = DDIMPipeline(unet.to(memory_format=torch.contiguous_format), scheduler)
    save_atomically(pipeline, path, null_class=null_class)
    return path


def _checked(labels: np.ndarray | None, count: int, num_classes: int | None = None) -> np.ndarray:
    """The labels, int64 [N]. Raises ModelError when they are missing, or others than -1 to num_classes - 1."""
    if labels is None:
        raise ModelError("prior.labels is true, but no labels were given: give one for each image, -1 where unknown")
    known = np.asarray(labels, dtype=np.int64)
    if known.shape != (count,):
        raise ModelError(f"prior.labels: {count} images and labels of shape {list(known.shape)}; give one for each")
    if (known < 0).all():
        raise ModelError("prior.labels is true, but no image has a label: set it to false")
    if num_classes is not None and not (known.min() >= -1 and known.max() < num_classes):
        raise ModelError(
            f"prior.labels: labels from {known.min()} to {known.max()} for {num_classes} classes; accepted are 0 to "
            f"{num_classes - 1}, and -1 for unknown"
        )
    return known


def _fit(
    unet: Any,
    scheduler: Any,
    images: ImageSet,
    labels: torch.Tensor | None,
    config: PriorConfig,
    progress: Callable[[int, int], None] | None,
) -> None:
    weights = list(unet.parameters())
    average = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(weights, lr=config.lr, weight_decay=0.01)
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * one_cycle(step / config.steps, warm=0.03)
        chosen = torch.randint(len(images), (config.batch_size,))
        clean = torch.from_numpy(images.images[chosen.numpy()]).float() / 127.5 - 1
        noise = torch.randn_like(clean)
        t = torch.randint(TRAIN_TIMESTEPS, (config.batch_size,))
        told = None
        if labels is not None:
            null_class = unet.config.num_class_embeds - 1
            told = torch.where(torch.rand(config.batch_size) < _DROPPED, null_class, labels[chosen])
        predicted = unet(scheduler.add_noise(clean, noise, t), t, class_labels=told, return_dict=False)[0]
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


def save_atomically(pipeline: Any, path: Path, *, null_class: int | None = None) -> None:
    """Save a diffusers pipeline so that `path` holds the old model or the whole new one, whatever happens.

    null_class: the label that means "no class", which diffusers' own configuration has no place for.
    """
    temporary = old = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        temporary.chmod(0o755)
        pipeline.save_pretrained(temporary, safe_serialization=True)
        if null_class is not None:
            (temporary / OWN_SETTINGS).write_text(json.dumps({"null_class": null_class}) + "\n")
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

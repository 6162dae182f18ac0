"""A random consistency model: 3x8x8 pixels, of 5 classes or of none."""

from pathlib import Path
from typing import Any

from diffusers import CMStochasticIterativeScheduler

from . import unet2d


def build(folder: Path, *, classes: int | None = None) -> Any:
    """The pipeline, saved to `folder`."""
    scheduler = CMStochasticIterativeScheduler(num_train_timesteps=40)
    return unet2d.build(
        folder,
        scheduler=scheduler,
        pipeline="ConsistencyModelPipeline",
        num_class_embeds=classes,
        resnet_time_scale_shift="scale_shift",
    )

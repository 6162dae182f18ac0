"""A random UNet2DModel pipeline: 3x8x8 pixels, with or without class labels."""

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, UNet2DModel


def unet(**settings: Any) -> UNet2DModel:
    torch.manual_seed(0)
    config = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "attention_head_dim": 8,
    }
    return UNet2DModel(**(config | settings)).eval()


def build(folder: Path, *, scheduler: Any = None, pipeline: str = "DDIMPipeline", **settings: Any) -> Any:
    """The pipeline, saved to `folder`. settings: of the UNet, such as num_class_embeds."""
    made = getattr(diffusers, pipeline)(unet=unet(**settings), scheduler=scheduler or DDIMScheduler())
    made.set_progress_bar_config(disable=True)
    made.save_pretrained(folder, safe_serialization=True)
    # Some pipelines replace their scheduler by their own kind.
    made.register_modules(scheduler=scheduler or made.scheduler)
    return made

"""A random Stable Diffusion: 32x32 pixels, latents of 4x16x16."""

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel

from . import clip

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def unet(**settings: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    config = {
        "sample_size": 16,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**(config | settings))


def autoencoder(**settings: Any) -> AutoencoderKL:
    torch.manual_seed(1)
    config = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (4, 8),
        "latent_channels": 4,
        "norm_num_groups": 4,
    }
    return AutoencoderKL(**(config | settings))


def tiny_autoencoder(folder: Path) -> AutoencoderTiny:
    """An AutoencoderTiny of the same factor, saved to `folder`."""
    torch.manual_seed(2)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    vae.save_pretrained(folder)
    return vae


def build(
    folder: Path, *, scheduler: Any = None, pipeline: str = "StableDiffusionPipeline", **unet_settings: Any
) -> Any:
    """The pipeline, saved to `folder`. unet_settings: such as time_cond_proj_dim for a UNet told the guidance."""
    made = getattr(diffusers, pipeline)(
        vae=autoencoder(),
        text_encoder=clip.text_encoder(),
        tokenizer=clip.tokenizer(folder / "tokenizer"),
        unet=unet(**unet_settings),
        scheduler=scheduler or DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.save_pretrained(folder, safe_serialization=True)
    made.set_progress_bar_config(disable=True)
    return made

"""A random SDXL: 32x32 pixels, latents of 4x16x16, text encoders of 32 and 48 values, pooled embeddings of 24."""

from pathlib import Path
from typing import Any

import diffusers
from diffusers import EulerDiscreteScheduler

from . import clip
from .stable_diffusion import SCHEDULE, autoencoder, unet

POOLED, WIDTH = 24, 8


def build(
    folder: Path,
    *,
    scheduler: Any = None,
    refiner: bool = False,
    force_zeros_for_empty_prompt: bool = True,
    **unet_settings: Any,
) -> Any:
    """The pipeline, saved to `folder`; the refiner has the second text encoder alone and an aesthetic score."""
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": WIDTH,
        "projection_class_embeddings_input_dim": POOLED + (5 if refiner else 6) * WIDTH,
        "cross_attention_dim": 48 if refiner else 80,
        "use_linear_projection": True,
    }
    parts = {
        "vae": autoencoder(),
        "text_encoder": None if refiner else clip.text_encoder(32, seed=0),
        "text_encoder_2": clip.text_encoder(48, projection=POOLED, seed=1),
        "tokenizer": None if refiner else clip.tokenizer(folder / "tokenizer"),
        "tokenizer_2": clip.tokenizer(folder / "tokenizer_2"),
        "unet": unet(**(added | unet_settings)),
        "scheduler": scheduler or EulerDiscreteScheduler(**SCHEDULE, steps_offset=1),
        "add_watermarker": False,
        "force_zeros_for_empty_prompt": force_zeros_for_empty_prompt,
    }
    if refiner:
        parts["requires_aesthetics_score"] = True
        made = diffusers.StableDiffusionXLImg2ImgPipeline(**parts)
    else:
        made = diffusers.StableDiffusionXLPipeline(**parts)
    made.save_pretrained(folder, safe_serialization=True)
    made.set_progress_bar_config(disable=True)
    return made

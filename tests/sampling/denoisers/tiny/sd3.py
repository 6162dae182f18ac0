"""A Stable Diffusion 3 small enough for a test: at most 32x32 pixels, with or without the T5."""

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

from . import clip, t5
from .stable_diffusion import autoencoder


def build(folder: Path, *, with_t5: bool = True) -> StableDiffusion3Pipeline:
    """Saves the pipeline into the folder and returns it."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=20,
        out_channels=4,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip.text_encoder(8, projection=8),
        tokenizer=clip.tokenizer(folder / "tokenizer"),
        text_encoder_2=clip.text_encoder(12, projection=12, seed=1),
        tokenizer_2=clip.tokenizer(folder / "tokenizer_2"),
        text_encoder_3=t5.text_encoder(32) if with_t5 else None,
        tokenizer_3=t5.tokenizer() if with_t5 else None,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder, safe_serialization=True)
    return pipeline

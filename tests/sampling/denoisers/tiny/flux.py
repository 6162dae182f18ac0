"""A Flux small enough for a test: like dev (embedded guidance, shifted by size) or like schnell (neither)."""

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from . import clip, t5
from .stable_diffusion import autoencoder


def build(folder: Path, *, dev: bool = True) -> FluxPipeline:
    """Saves the pipeline into the folder and returns it."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=dev,
    )
    # As published: dev is shifted with the image's size, schnell not at all.
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    if not dev:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    pipeline = FluxPipeline(
        scheduler=scheduler,
        vae=autoencoder(scaling_factor=0.36, shift_factor=0.12, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip.text_encoder(8),
        tokenizer=clip.tokenizer(folder / "tokenizer"),
        text_encoder_2=t5.text_encoder(32),
        tokenizer_2=t5.tokenizer(),
        transformer=transformer.eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder, safe_serialization=True)
    return pipeline

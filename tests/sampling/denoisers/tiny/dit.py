"""A DiT small enough for a test: 1,000 classes as the pipeline has them, 16x16 pixels, epsilon and sigma."""

from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from .stable_diffusion import autoencoder


def build(folder: Path, *, sigma: bool = True) -> DiTPipeline:
    """Saves the pipeline into the folder and returns it. sigma=False predicts epsilon alone."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8 if sigma else 4,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    scheduler = DDIMScheduler(clip_sample=False, beta_schedule="linear")
    pipeline = DiTPipeline(transformer.eval(), autoencoder(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder, safe_serialization=True)
    return pipeline

"""A random IF cascade: a base model of 16x16 pixels and a super-resolution stage of 32x32."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, IFPipeline, IFSuperResolutionPipeline, UNet2DConditionModel

from . import t5

SIZE, UPSCALED_SIZE = 16, 32
TEXT_WIDTH = 16
# As published.
SCHEDULE = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "epsilon"}
LEARNED = {
    "variance_type": "learned_range",
    "thresholding": True,
    "dynamic_thresholding_ratio": 0.95,
    "sample_max_value": 1.5,
    "clip_sample": True,
}


def unet(**settings: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    config = {
        "sample_size": SIZE,
        "in_channels": 3,
        "out_channels": 6,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "norm_num_groups": 4,
        "cross_attention_dim": 32,
        "cross_attention_norm": "group_norm",
        "encoder_hid_dim": TEXT_WIDTH,
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 2,
        "attention_head_dim": 4,
        "resnet_time_scale_shift": "scale_shift",
        "act_fn": "gelu",
    }
    return UNet2DConditionModel(**(config | settings)).eval()


def build(folder: Path, *, scheduler: Any = None, **unet_settings: Any) -> IFPipeline:
    """The base pipeline, saved into the folder."""
    pipeline = IFPipeline(
        tokenizer=t5.tokenizer(),
        text_encoder=t5.text_encoder(TEXT_WIDTH),
        unet=unet(**unet_settings),
        scheduler=scheduler or DDPMScheduler(**SCHEDULE, **LEARNED),
        **_WITHOUT_CHECKS,
    )
    return _saved(pipeline, folder)


def build_upscaler(folder: Path, *, scheduler: Any = None, **unet_settings: Any) -> IFSuperResolutionPipeline:
    """The super-resolution pipeline, saved into the folder without the text encoder, which is the base model's."""
    second = {"sample_size": UPSCALED_SIZE, "in_channels": 6, "class_embed_type": "timestep"}
    pipeline = IFSuperResolutionPipeline(
        tokenizer=None,
        text_encoder=None,
        unet=unet(**(second | unet_settings)),
        scheduler=scheduler or DDPMScheduler(**SCHEDULE, **LEARNED),
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        **_WITHOUT_CHECKS,
    )
    return _saved(pipeline, folder)


_WITHOUT_CHECKS: dict[str, Any] = {
    "safety_checker": None,
    "feature_extractor": None,
    "watermarker": None,
    "requires_safety_checker": False,
}


def _saved(pipeline: Any, folder: Path) -> Any:
    pipeline.save_pretrained(folder, safe_serialization=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline

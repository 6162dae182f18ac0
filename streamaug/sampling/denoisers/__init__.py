"""Denoisers: one adapter per model family between a diffusers model and the sampler."""

from pathlib import Path
from types import ModuleType

from streamaug.errors import ModelError, nearest
from streamaug.sampling.denoisers import unet2d
from streamaug.sampling.denoisers.base import (
    Conditioning,
    Denoiser,
    LoadSettings,
    ModelInfo,
    Rows,
    conditional_half,
    load_scheduler,
    read_json,
)

FAMILIES: dict[str, ModuleType] = {module.FAMILY: module for module in (unet2d,)}
"""Each module has FAMILY, PIPELINES, inspect(path, index, image_size, variant) and load(info, settings)."""

__all__ = [
    "FAMILIES",
    "Conditioning",
    "Denoiser",
    "LoadSettings",
    "ModelInfo",
    "Rows",
    "conditional_half",
    "inspect",
    "load",
    "load_scheduler",
]


def inspect(path: Path, image_size: int | None = None, variant: str | None = None) -> ModelInfo:
    """Read a diffusers pipeline folder's configuration, and hash its weights.

    image_size: the side in pixels that images shall have, for families that can make any; others ignore it. Raises
    ModelError naming what is missing or not supported.
    """
    index = read_json(path, "model_index.json")
    pipeline = index.get("_class_name")
    supported = {name: module for module in FAMILIES.values() for name in module.PIPELINES}
    if pipeline not in supported:
        raise ModelError(
            f"{path}: the pipeline {pipeline!r} is not supported{nearest(str(pipeline), list(supported))}; "
            f"supported: {', '.join(supported)}"
        )
    return supported[pipeline].inspect(path, index, image_size, variant)


def load(info: ModelInfo, settings: LoadSettings) -> Denoiser:
    """The family's denoiser with its weights, on the device. Raises ModelError when they cannot be used."""
    return FAMILIES[info.family].load(info, settings)

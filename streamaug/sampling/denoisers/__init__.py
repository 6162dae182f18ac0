"""Denoisers: one adapter per model family between a diffusers model and the sampler."""

from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any

from streamaug.errors import ModelError, nearest
from streamaug.sampling.denoisers import deepfloyd_if, dit, flux, sd3, sdxl, stable_diffusion, unet2d
from streamaug.sampling.denoisers.base import (
    Conditioning,
    Denoiser,
    LoadSettings,
    ModelInfo,
    Rows,
    conditional_half,
    read_json,
    saved_scheduler,
    with_class_ids,
)

FAMILIES: dict[str, ModuleType] = {
    module.FAMILY: module for module in (unet2d, stable_diffusion, sdxl, dit, sd3, flux, deepfloyd_if)
}
"""Each module has FAMILY, PIPELINES, inspect(path, index, image_size, variant) and load(info, settings); where there
is one, REFUSED has the reason by pipeline; adjust_scheduler(pipeline, scheduler) is what the pipeline makes of it;
timing(info, scheduler, steps) is what the pipeline passes to `set_timesteps`, None for nothing;
ETA is what the pipelines pass to a scheduler whose step takes an eta;
cleaned(info, texts) is what the pipeline makes of prompts before it encodes them;
null_is_zero(info) is whether zeros stand for a negative prompt that is not there;
UPSCALERS and inspect_cascade(path, index, upscaler, image_size, variant) are for models that start a cascade."""

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
    "step_options",
    "timing",
    "with_class_ids",
]


def inspect(
    path: Path, image_size: int | None = None, variant: str | None = None, upscaler: Path | None = None
) -> ModelInfo:
    """Read a diffusers pipeline folder's configuration, and hash its weights.

    image_size: the side in pixels that images shall have, for families that can make any; others ignore it.
    upscaler: the folder of a cascade's second stage. Raises ModelError naming what is missing or not supported.
    """
    index = read_json(path, "model_index.json")
    _refuse_code(path, index)
    pipeline = index.get("_class_name")
    supported = {name: module for module in FAMILIES.values() for name in module.PIPELINES}
    reasons = {name: reason for module in FAMILIES.values() for name, reason in getattr(module, "REFUSED", {}).items()}
    if pipeline in reasons:
        raise ModelError(f"{path}: {pipeline} is not supported: {reasons[pipeline]}")
    if pipeline not in supported:
        raise ModelError(
            f"{path}: the pipeline {pipeline!r} is not supported{nearest(str(pipeline), list(supported))}; "
            f"supported: {', '.join(supported)}"
        )
    family = supported[pipeline]
    if upscaler is None:
        return family.inspect(path, index, image_size, variant)
    if not hasattr(family, "UPSCALERS"):
        having = [name for name, module in supported.items() if hasattr(module, "UPSCALERS")]
        raise ModelError(f"model.upscaler: {pipeline} takes none, set it to null; accepted are: {', '.join(having)}")
    return family.inspect_cascade(path, index, upscaler, image_size, variant)


def load(info: ModelInfo, settings: LoadSettings) -> Denoiser:
    """The family's denoiser with its weights, on the device. Raises ModelError when they cannot be used."""
    return FAMILIES[info.family].load(info, settings)


def load_scheduler(path: Path, component: str = "scheduler") -> Any:
    """The scheduler object a model folder was saved with, as its pipeline would run it. Raises ModelError."""
    scheduler = saved_scheduler(path, component)
    pipeline = read_json(path, "model_index.json").get("_class_name")
    for family in FAMILIES.values():
        if pipeline in family.PIPELINES and hasattr(family, "adjust_scheduler"):
            return family.adjust_scheduler(pipeline, scheduler)
    return scheduler


def step_options(info: ModelInfo, scheduler: Any) -> dict[str, Any] | None:
    """What the model's pipeline passes to `scheduler.step`, where the step's own default is another."""
    family, eta = FAMILIES[info.family], signature(scheduler.step).parameters.get("eta")
    if eta is None or getattr(family, "ETA", eta.default) == eta.default:
        return None
    return {"eta": family.ETA}


def timing(info: ModelInfo, scheduler: Any, steps: int) -> dict[str, Any] | None:
    """What the model's pipeline passes to `scheduler.set_timesteps` besides the number of steps, if anything."""
    family = FAMILIES[info.family]
    return family.timing(info, scheduler, steps) if hasattr(family, "timing") else None


def _refuse_code(path: Path, index: dict[str, Any]) -> None:
    """Raises ModelError for a pipeline, or a part of it, that is a class of the folder's own."""
    for part in ("_class_name", "scheduler", "unet", "transformer", "vae"):
        named = index.get(part)
        if isinstance(named, list) and (part == "_class_name" or named[0] not in (None, "diffusers")):
            what = "the pipeline" if part == "_class_name" else part
            raise ModelError(
                f"{path}: {what} is a {named[-1]} of {named[0]}: code of its own, and none is run from a model folder"
            )

"""Shift: how flow-matching pipelines move the noise levels with the image's size, as `set_timesteps` takes it."""

import inspect
from typing import Any


def shift_for(scheduler: Any, tokens: int, *, max_shift: float) -> dict[str, float]:
    """{"mu": the shift for an image of so many patches}, or {} when the scheduler does not shift by size.

    The shift is linear in `tokens`, from base_shift at base_image_seq_len to max_shift at max_image_seq_len. max_shift:
    the family's own, for a scheduler that does not say (Esser et al. 2024, section 5.3.2).
    """
    config = scheduler.config
    if not config.get("use_dynamic_shifting") or not takes(scheduler, "mu"):
        return {}
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", max_shift)
    slope = (high - low) / (many - few)
    return {"mu": tokens * slope + (low - slope * few)}


def takes(scheduler: Any, argument: str) -> bool:
    """Whether the scheduler's `set_timesteps` has the argument."""
    return argument in inspect.signature(scheduler.set_timesteps).parameters

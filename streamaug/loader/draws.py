"""Random draws of transforms, decided by a seed alone: neither by other threads nor by the user's generator."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_DRAWS = {
    torch.rand,
    torch.randn,
    torch.randint,
    torch.randperm,
    torch.normal,
    torch.bernoulli,
    torch.multinomial,
    torch.poisson,
    torch.Tensor.bernoulli,
    torch.Tensor.bernoulli_,
    torch.Tensor.cauchy_,
    torch.Tensor.exponential_,
    torch.Tensor.geometric_,
    torch.Tensor.log_normal_,
    torch.Tensor.multinomial,
    torch.Tensor.normal_,
    torch.Tensor.random_,
    torch.Tensor.uniform_,
}


class SeededDraws(TorchFunctionMode):
    """Inside it, torch's random functions draw from generators of this thread's own, one for each device.

    The global generators are neither read nor moved, so threads cannot disturb each other's draws or the user's.
    """

    def __init__(self, seed: int):
        super().__init__()
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWS and kwargs.get("generator") is None:
            kwargs = {**kwargs, "generator": self._generator(_device(args, kwargs))}
        return func(*args, **kwargs)

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]


def _device(args: Any, kwargs: Any) -> torch.device:
    """Where a random function draws: the device it is told, or that of its tensor."""
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"])
    tensors = (value.device for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
    return next(tensors, torch.get_default_device())

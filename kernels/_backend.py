"""Which implementation of a kernel runs: Triton where it can, the torch reference everywhere else.

The one place that imports Triton. Without it the kernels can still be defined, and the references are used.
"""

import contextlib
import importlib
from collections.abc import Callable
from typing import Any, Literal

import torch

from streamaug.errors import UsageError

Backend = Literal["auto", "torch", "triton"]


class _NoTriton:
    """Stands in for `triton` and `triton.language`, so that kernels can be defined, never run."""

    constexpr = int
    int64 = int

    def jit(self, function: Callable | None = None, **_: Any) -> Callable:
        return function if function is not None else lambda function: function


try:
    triton: Any = importlib.import_module("triton")
    tl: Any = importlib.import_module("triton.language")
except ImportError:
    triton = tl = _NoTriton()


def triton_available() -> bool:
    """Whether Triton is installed."""
    return not isinstance(triton, _NoTriton)


def interpreted() -> bool:
    """Whether Triton was imported under TRITON_INTERPRET=1, so that its kernels run on CPU tensors."""
    return triton_available() and not isinstance(tl.philox, triton.JITFunction)


def use_triton(backend: Backend, tensor: torch.Tensor) -> bool:
    """Whether the Triton kernel is to run on `tensor`'s device.

    Raises UsageError when `backend` is "triton" and it cannot, or when `backend` is none of the three names.
    """
    if backend == "torch":
        return False
    if backend == "auto":
        return tensor.is_cuda and triton_available()
    if backend != "triton":
        raise UsageError(f"backend {backend!r}: expected 'auto', 'torch' or 'triton'")
    if not triton_available():
        raise UsageError("backend 'triton': Triton is not installed; pip install triton, or use backend 'auto'")
    if not tensor.is_cuda and not interpreted():
        raise UsageError(
            f"backend 'triton': the tensors are on {tensor.device} and Triton runs on CUDA devices; "
            "use backend 'auto', or set TRITON_INTERPRET=1 before the first import to interpret the kernels"
        )
    return True


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """The context in which a kernel is launched for `tensor`: its CUDA device is the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def tile(elements: int) -> int:
    """Elements one program computes of an image of `elements`: a power of two from 4 to 1024."""
    return min(max(next_power_of_2(elements), 4), 1024)

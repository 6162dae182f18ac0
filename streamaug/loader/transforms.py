"""Synthetic pixels in the real batch's form: the dataset's own transform, or a plain conversion in one pass.

In the loader, between `Stream.take` and the merged batch, with the check of the first batch.
"""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from streamaug.errors import DataError, MismatchError, UsageError
from streamaug.loader.batch import memory_format
from streamaug.loader.interleave import image_seeds

Normalize = tuple[Sequence[float], Sequence[float]]

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
    """Inside it, torch's random functions on the CPU draw from a generator of this thread's own.

    The global generator is neither read nor moved, so threads cannot disturb each other's draws or the
    user's.
    """

    def __init__(self, seed: int):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWS and kwargs.get("generator") is None and _on_cpu(args, kwargs):
            kwargs = {**kwargs, "generator": self.generator}
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Appearance:
    """What a batch of images looks like: dtype, shape of one image, range of values."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    low: float
    high: float
    note: str = ""

    @classmethod
    def of(cls, images: torch.Tensor, note: str = "") -> "Appearance":
        """`images`: [n, ...] of any dtype; non-finite values are left out of the range."""
        values = images.float()
        values = values[torch.isfinite(values)]
        low, high = (values.min().item(), values.max().item()) if values.numel() else (0.0, 0.0)
        return cls(images.dtype, tuple(images.shape[1:]), low, high, note)

    @property
    def span(self) -> float:
        return self.high - self.low

    def __str__(self) -> str:
        values = f"values {_short(self.low)} to {_short(self.high)}"
        return f"{_name(self.dtype)} {list(self.shape)}, {values}{self.note}"


class Converter:
    """uint8 synthetic images [n, C, H, W] to the real batch's dtype, shape, range, device and layout.

    transform: called on each image where given, in `workers` threads; torch draws inside it depend on the
    seeds handed in alone. `from_dataset` transforms get what they accept (a PIL image, a uint8 tensor or a
    float tensor in [0, 1], tried in this order); other transforms get the uint8 tensor [C, H, W].
    normalize: (mean, std) per channel, for pixels scaled to [0, 1], used where no transform made floats.
    real: a batch of real images; None converts to float32 in [0, 1] with nothing to agree with.
    Raises MismatchError when the outcome does not look like the real images.
    """

    def __init__(
        self,
        real: torch.Tensor | None,
        image_shape: tuple[int, int, int],
        transform: Callable | None,
        *,
        from_dataset: bool,
        normalize: Normalize | None,
        workers: int | None = None,
    ):
        self.transform = transform
        self.workers = workers or min(4, os.cpu_count() or 1)
        self.seconds = 0.0
        self._pool: ThreadPoolExecutor | None = None
        self._source = "dataset.transform" if from_dataset else "transform="
        self.dtype, self.device, self.format = torch.float32, torch.device("cpu"), torch.contiguous_format
        appearance = None
        if real is not None:
            self.dtype, self.device, self.format = real.dtype, real.device, memory_format(real)
            appearance = Appearance.of(real)
        self._scale = normalize or (_natural_scale(appearance) if appearance else None)
        self._form = "uint8 tensor"
        probes = _probes(image_shape)
        if transform is not None:
            self._form, made = self._choose_form(probes[-1], appearance, from_dataset)
            if made.is_floating_point() and normalize is not None:
                raise UsageError(
                    "normalize= and a transform that returns floats are both given; normalise in the "
                    "transform, or pass transform=None"
                )
            if real is None and made.is_floating_point():
                self.dtype = made.dtype
        if appearance is not None:
            outcome = self._finished(probes, (0,))
            note = f" (after {self._source}, given a {self._form})" if transform is not None else ""
            _check(appearance, Appearance.of(outcome, note), from_dataset)

    def __call__(self, images: np.ndarray, key: tuple[int, ...]) -> torch.Tensor:
        """`key` (seed, rank, step) decides the draws of the transform."""
        began = time.perf_counter()
        pixels = self._finished(images, key)
        self.seconds += time.perf_counter() - began
        return pixels

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def _finished(self, images: np.ndarray, key: tuple[int, ...]) -> torch.Tensor:
        """On the device; floats of any precision, or the real batch's dtype."""
        pixels = torch.from_numpy(images) if self.transform is None else self._transformed(images, key)
        pixels = pixels.to(self.device, non_blocking=True)
        if pixels.dtype == torch.uint8:
            pixels = self._collect(pixels)
        if pixels.is_floating_point() and self.dtype.is_floating_point:
            pixels = pixels.to(self.dtype)
        return pixels

    def _collect(self, pixels: torch.Tensor) -> torch.Tensor:
        from streamaug.kernels.collect import collect

        index = torch.arange(len(pixels), device=pixels.device)
        if self.dtype == torch.uint8:
            return collect(pixels, index, dtype=torch.uint8, memory_format=self.format)
        mean, std = (_per_channel(values, pixels) for values in self._scale) if self._scale else (None, None)
        dtype = self.dtype if self.dtype.is_floating_point else torch.float32
        return collect(pixels, index, mean=mean, std=std, dtype=dtype, memory_format=self.format)

    def _transformed(self, images: np.ndarray, key: tuple[int, ...]) -> torch.Tensor:
        seeds = image_seeds(key, len(images))

        def chunk(first: int, last: int) -> list[torch.Tensor]:
            return [self._one(images[i], seeds[i], self._form) for i in range(first, last)]

        if self.workers == 1 or len(images) < 2:
            return torch.stack(chunk(0, len(images)))
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="streamaug-transform")
        bounds = [len(images) * part // self.workers for part in range(self.workers + 1)]
        parts = self._pool.map(chunk, bounds[:-1], bounds[1:])
        return torch.stack([image for part in parts for image in part])

    def _one(self, image: np.ndarray, seed: int, form: str) -> torch.Tensor:
        assert self.transform is not None
        with SeededDraws(seed):
            out = self.transform(_FORMS[form](image))
        if isinstance(out, np.ndarray):  # timm's, before its prefetcher
            out = torch.from_numpy(out)
        if not isinstance(out, torch.Tensor):
            raise DataError(f"the transform returned a {type(out).__name__}; a tensor is needed")
        return out.as_subclass(torch.Tensor)

    def _choose_form(self, probe: np.ndarray, real: Appearance | None, from_dataset: bool) -> tuple[str, torch.Tensor]:
        """The kind of input the transform accepts, and what it makes of the probe uint8 [C, H, W]."""
        accepted: list[tuple[str, torch.Tensor]] = []
        refusals = []
        for form in _FORMS if from_dataset else ("uint8 tensor",):
            try:
                made = self._one(probe, 0, form)
            except Exception as error:  # a user's transform raises what it likes for input it does not take
                refusals.append(f"  given a {form}: {type(error).__name__}: {error}")
                continue
            accepted.append((form, made))
            if real is None or tuple(made.shape) == real.shape:
                return form, made
        if accepted:
            return accepted[0]
        wanted = f"tensor {list(real.shape)} of {_name(real.dtype)}" if real else "tensor"
        raise DataError(
            f"{self._source} cannot be applied to synthetic images, uint8 {list(probe.shape)}:\n"
            + "\n".join(refusals)
            + f"\npass StreamLoader(..., transform=f) with f: uint8 tensor [C, H, W] -> {wanted}"
        )


def _check(real: Appearance, synthetic: Appearance, from_dataset: bool) -> None:
    """`synthetic` describes black, white and shaded probes: the whole range of synthetic images."""
    if real.shape != synthetic.shape:
        _refuse(
            "shape",
            real,
            synthetic,
            "set data.image_size and data.channels of the stream's configuration, or pass transform= (uint8 "
            f"tensor [C, H, W] -> {list(real.shape)})",
        )
    if real.dtype != synthetic.dtype:
        _refuse("dtype", real, synthetic, "pass transform= returning the real dtype, or transform=None")
    if real.dtype == torch.uint8 or synthetic.span <= 0:
        return
    slack = (2.0 if from_dataset else 0.25) * synthetic.span
    inside = synthetic.low - slack <= real.low and real.high <= synthetic.high + slack
    unit = real.low >= -1e-3 and real.high <= 1.001
    synthetic_unit = synthetic.low >= -0.05 and synthetic.high <= 1.05
    if not inside or real.span < 0.1 * synthetic.span or (unit and not synthetic_unit):
        _refuse(
            "range",
            real,
            synthetic,
            "pass normalize=(mean, std) as the real images are normalised, or transform= (uint8 tensor [C, "
            "H, W] -> the real range)",
        )


def _refuse(what: str, real: Appearance, synthetic: Appearance, fix: str) -> None:
    raise MismatchError(
        f"real and synthetic images differ in {what}:\n  real:      {real}\n  synthetic: {synthetic}\n{fix}"
    )


def _natural_scale(real: Appearance) -> Normalize | None:
    """(mean, std) that takes [0, 1] to the real range where that is plain: 0 to 255, or −1 to 1."""
    if real.low >= 0 and 100 <= real.high <= 255:
        return (0.0,), (1 / 255,)
    if -1.001 <= real.low <= -0.99 and real.high <= 1.001:
        return (0.5,), (0.5,)
    return None


def _per_channel(values: Sequence[float], pixels: torch.Tensor) -> torch.Tensor:
    channels = pixels.shape[1]
    vector = torch.as_tensor(values, dtype=torch.float32).flatten()
    if len(vector) not in (1, channels):
        raise UsageError(
            f"normalize= has {len(vector)} values; the images have {channels} channels: give {channels}, or one"
        )
    return vector.expand(channels).contiguous().to(pixels.device)


def _probes(shape: tuple[int, int, int]) -> np.ndarray:
    """uint8 [3, C, H, W]: black, white, and a shade from one to the other."""
    shade = np.linspace(0, 255, shape[-2] * shape[-1]).astype(np.uint8).reshape(shape[-2:])
    return np.stack([np.zeros(shape, np.uint8), np.full(shape, 255, np.uint8), np.broadcast_to(shade, shape)])


def _to_pil(image: np.ndarray) -> Any:
    from PIL import Image

    if len(image) == 1:
        return Image.fromarray(image[0])
    return Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))


_FORMS: dict[str, Callable[[np.ndarray], Any]] = {
    "PIL image": _to_pil,
    "uint8 tensor": torch.from_numpy,
    "float tensor": lambda image: torch.from_numpy(image).float() / 255,
}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _short(value: float) -> str:
    return f"{round(value, 3):g}"


def _on_cpu(args: Any, kwargs: Any) -> bool:
    device = kwargs.get("device")
    if device is not None:
        return torch.device(device).type == "cpu"
    return all(value.device.type == "cpu" for value in args if isinstance(value, torch.Tensor))

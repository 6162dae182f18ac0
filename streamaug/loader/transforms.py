"""Synthetic pixels in the real batch's form: the dataset's own transform, or a plain conversion in one pass.

In the loader, between `Stream.take` and the merged batch, with the check of the first batch.
"""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from streamaug.errors import DataError, UsageError
from streamaug.loader.appearance import Appearance, channels_last, check, check_device, name_of, natural_scale
from streamaug.loader.batch import memory_format
from streamaug.loader.draws import SeededDraws
from streamaug.loader.interleave import batch_seed, image_seeds

Normalize = tuple[Sequence[float], Sequence[float]]

_TRANSFORM_MODULES = (
    "torchvision.transforms",
    "albumentations",
    "kornia.augmentation",
    "monai.transforms",
    "timm.data",
)


class Converter:
    """uint8 synthetic images [n, C, H, W] to the real batch's dtype, shape, range, device and layout.

    transform: called on each image where given, in `workers` threads; torch draws inside it depend on the
    seeds handed in alone. `from_dataset` transforms get what they accept (a PIL image, a uint8 tensor or a
    float tensor in [0, 1], tried in this order); other transforms get the uint8 tensor [C, H, W].
    batch_transform: called on the whole batch where given, after `transform` if there is one, on the real batch's
    device: uint8 [n, C, H, W] -> tensor [n, ...].
    normalize: (mean, std) per channel, for pixels scaled to [0, 1], used where no transform made floats. Bytes are
    moved to the device as they are; scaling, cast and layout are one pass of the `collect` kernel there.
    any_layout: real images may be [n, H, W, C], and synthetic ones are turned to that at the end.
    real: a batch of real images; None converts to float32 in [0, 1] with nothing to agree with.
    Raises MismatchError when the outcome does not look like the real images, UsageError for a normalize that cannot be.
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
        batch_transform: Callable | None = None,
        any_layout: bool = False,
    ):
        if normalize is not None:
            _check_normalize(normalize)
        self.transform = transform
        self.batch_transform = batch_transform
        self.workers = workers or min(4, os.cpu_count() or 1)
        self.seconds = 0.0
        self._pool: ThreadPoolExecutor | None = None
        self.dtype, self.device, self.format = torch.float32, torch.device("cpu"), torch.contiguous_format
        appearance = None
        if real is not None:
            self.dtype, self.device, self.format = real.dtype, real.device, memory_format(real)
            appearance = Appearance.of(real)
            if normalize is not None and not real.is_floating_point():
                raise UsageError(
                    f"normalize= makes floats and the real images are {name_of(real.dtype)}: leave it out, and "
                    "normalise the mixed batch as the real ones are"
                )
        self._scale = normalize or (natural_scale(appearance) if appearance else None)
        self._on_device: tuple[torch.Tensor, torch.Tensor] | None = None  # the scale, once it is there
        self._source = "dataset.transform" if from_dataset else "transform="
        self._form = "uint8 tensor"
        probes = _probes(image_shape)
        made: Any = probes
        if transform is not None:
            self._form, one = self._choose_form(probes[-1], None if batch_transform else appearance, from_dataset)
            check_device(one, self.device, self._source)
            made = self._transformed(probes, (0,))
        if batch_transform is not None:
            self._source = "batch_transform="
        made = self._batch_transformed(self._there(made), (0,))
        check_device(made, self.device, self._source)
        if made.is_floating_point() and normalize is not None:
            raise UsageError(
                "normalize= and a transform that returns floats are both given; normalise in the "
                "transform, or pass transform=None"
            )
        if real is None and made.is_floating_point():
            self.dtype = made.dtype
        self._turned = False
        if appearance is not None:
            shape = tuple(made.shape[1:])
            self._turned = any_layout and channels_last(shape) == appearance.shape != shape
            changed = transform is not None or batch_transform is not None
            note = f" (after {self._source}, given a {self._form})" if changed else ""
            check(appearance, Appearance.of(self._cast(made), note), from_dataset)

    def __call__(self, images: np.ndarray | torch.Tensor, key: tuple[int, ...]) -> torch.Tensor:
        """`key` (seed, rank, step) decides the draws of the transform. Tensors may be on a device already."""
        began = time.perf_counter()
        pixels: Any = images if self.transform is None else self._transformed(_on_cpu(images), key)
        pixels = self._cast(self._batch_transformed(self._there(pixels), key))
        self.seconds += time.perf_counter() - began
        return pixels

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def _there(self, pixels: np.ndarray | torch.Tensor) -> torch.Tensor:
        """On the device of the real batch."""
        here = torch.from_numpy(pixels) if isinstance(pixels, np.ndarray) else pixels
        if self.device.type == "cuda" and here.device.type == "cpu":
            here = here.pin_memory()
        return here.to(self.device, non_blocking=True)

    def _batch_transformed(self, pixels: torch.Tensor, key: tuple[int, ...]) -> torch.Tensor:
        if self.batch_transform is None:
            return pixels
        with SeededDraws(batch_seed(key)):
            made = self.batch_transform(pixels)
        if not isinstance(made, torch.Tensor) or len(made) != len(pixels):
            what = f"{list(made.shape)}" if isinstance(made, torch.Tensor) else f"a {type(made).__name__}"
            raise DataError(f"batch_transform= was given {list(pixels.shape)} and returned {what}; a tensor of as many")
        return made.as_subclass(torch.Tensor)

    def _cast(self, pixels: torch.Tensor) -> torch.Tensor:
        """Floats of any precision, or the real batch's dtype."""
        if pixels.dtype == torch.uint8:
            grey = pixels.ndim == 3  # [n, H, W]
            pixels = self._collect((pixels[:, None] if grey else pixels).contiguous())
            pixels = pixels[:, 0] if grey else pixels
        if pixels.is_floating_point() and self.dtype.is_floating_point:
            pixels = pixels.to(self.dtype)
        return pixels.permute(0, 2, 3, 1) if self._turned else pixels

    def _collect(self, pixels: torch.Tensor) -> torch.Tensor:
        from streamaug.kernels.collect import collect

        index = torch.arange(len(pixels), device=pixels.device)
        if not self.dtype.is_floating_point:
            return collect(pixels, index, dtype=torch.uint8, memory_format=self.format).to(self.dtype)
        if self._scale is not None and self._on_device is None:
            self._on_device = _per_channel(self._scale[0], pixels), _per_channel(self._scale[1], pixels)
        mean, std = self._on_device or (None, None)
        return collect(pixels, index, mean=mean, std=std, dtype=self.dtype, memory_format=self.format)

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
        wanted = f"tensor {list(real.shape)} of {name_of(real.dtype)}" if real else "tensor"
        raise DataError(
            f"{self._source} cannot be applied to synthetic images, uint8 {list(probe.shape)}:\n"
            + "\n".join(refusals)
            + f"\npass StreamLoader(..., transform=f) with f: uint8 tensor [C, H, W] -> {wanted}"
        )


def transform_by_another_name(dataset: Any) -> str | None:
    """Where a dataset, or one that it wraps, keeps a transform that is not called so: "an attribute `aug`"."""
    seen: list[Any] = []
    while dataset is not None and not any(dataset is other for other in seen):
        seen.append(dataset)
        if isinstance(form := getattr(dataset, "format", None), dict) and form.get("type") == "custom":
            return "a function given to set_transform"  # Hugging Face datasets
        for name, value in getattr(dataset, "__dict__", {}).items():
            if name != "target_transform" and type(value).__module__.startswith(_TRANSFORM_MODULES):
                return f"an attribute `{name}`"
        dataset = getattr(dataset, "dataset", None)
    return None


def _on_cpu(images: np.ndarray | torch.Tensor) -> np.ndarray:
    return images.cpu().numpy() if isinstance(images, torch.Tensor) else images


def _numbers(values: Any) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float32).flatten()


def _check_normalize(normalize: Any) -> None:
    """Raise UsageError for what is not (mean, std), or a deviation that images cannot be divided by."""
    try:
        mean, std = map(_numbers, normalize)
    except (TypeError, ValueError):
        raise UsageError(
            f"normalize= is (mean, std), each a number for every channel, got {normalize!r}; for ImageNet's: "
            "((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))"
        ) from None
    if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
        raise UsageError(f"normalize=(mean, std): finite numbers are needed, std above 0, got {normalize!r}")


def _per_channel(values: Sequence[float], pixels: torch.Tensor) -> torch.Tensor:
    channels = pixels.shape[1]
    vector = _numbers(values)
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

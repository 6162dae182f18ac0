"""Ring slots become a training batch: gather, scale, normalise, cast and lay out in one pass."""

import functools
from collections.abc import Sequence

import torch
from streamaug.kernels._backend import Backend, on_device, tile, tl, triton, use_triton
from streamaug.kernels.philox import check_ids, check_out

from streamaug.errors import UsageError

Values = Sequence[float] | torch.Tensor


def collect(
    slots: torch.Tensor,
    index: torch.Tensor,
    *,
    mean: Values | None = None,
    std: Values | None = None,
    dtype: torch.dtype = torch.uint8,
    memory_format: torch.memory_format = torch.contiguous_format,
    out: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """The images slots[index] as bytes, or as (slots[index] / 255 - mean) / std when `dtype` is a float.

    slots: uint8 [M, C, H, W], contiguous. index: int64 [n], each in 0..M-1 (Triton does not check).
    mean, std: one number a channel, in units of the image scaled to [0, 1]; both or neither.
    Returns `out` (contiguous or channels_last, as it is) or a new tensor [n, C, H, W] of `dtype` in
    `memory_format`. Raises UsageError.
    """
    if slots.dtype != torch.uint8 or slots.dim() != 4 or not slots.is_contiguous():
        raise UsageError(f"slots: expected contiguous uint8 [M, C, H, W], got {slots.dtype} {list(slots.shape)}")
    count, (channels, height, width) = index.shape[0], slots.shape[1:]
    check_ids(index, count, "index")
    if dtype != torch.uint8 and not dtype.is_floating_point:
        raise UsageError(f"dtype {dtype}: expected torch.uint8 or a float type")
    scale = _scale(mean, std, dtype, channels, slots.device)
    shape = (count, channels, height, width)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=slots.device, memory_format=memory_format)
    else:
        check_out(out, shape, dtype, slots.device)
    if out.is_contiguous():
        strides = height * width, 1
    elif out.is_contiguous(memory_format=torch.channels_last):
        strides = 1, channels
    else:
        raise UsageError("out: expected a contiguous or channels_last tensor")
    if out.numel() == 0:
        return out
    if not use_triton(backend, slots):
        _reference(slots, index, scale, out)
        return out
    size = channels * height * width
    block = tile(size)
    with on_device(slots):
        _collect_kernel[(count, triton.cdiv(size, block))](
            slots,
            index,
            *(scale or (slots, slots)),
            out,
            size,
            height * width,
            *strides,
            SCALE=dtype != torch.uint8,
            NORMALISE=scale is not None,
            BLOCK=block,
        )
    return out


def _scale(
    mean: Values | None, std: Values | None, dtype: torch.dtype, channels: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Mean and std as fp32 [C] on the device, or None."""
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise UsageError("mean and std: give both or neither")
    if dtype == torch.uint8:
        raise UsageError("mean and std: bytes are not normalised; give a float dtype")
    pair = _on_device(mean, device), _on_device(std, device)
    if any(values.shape != (channels,) for values in pair):
        raise UsageError(
            f"mean and std: expected {channels} numbers each, one a channel, "
            f"got {pair[0].numel()} and {pair[1].numel()}"
        )
    return pair


def _on_device(values: Values, device: torch.device) -> torch.Tensor:
    if isinstance(values, torch.Tensor):
        return values.to(device, torch.float32)
    return _constant(tuple(values), device)


@functools.lru_cache(maxsize=64)
def _constant(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


def _reference(
    slots: torch.Tensor,
    index: torch.Tensor,
    scale: tuple[torch.Tensor, torch.Tensor] | None,
    out: torch.Tensor,
) -> None:
    images = slots.index_select(0, index)
    if out.dtype == torch.uint8:
        out.copy_(images)
        return
    # The layout changes while the images are still bytes.
    target = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    target.copy_(images).div_(255)
    if scale is not None:
        mean, std = (values[:, None, None] for values in scale)
        target.sub_(mean).div_(std)
    if target is not out:
        out.copy_(target)


@triton.jit
def _collect_kernel(
    slots,
    index,
    mean,
    std,
    out,
    size,
    pixels,
    channel_stride,
    pixel_stride,
    SCALE: tl.constexpr,
    NORMALISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Image numbers are int64: a pool of slots may have more than 2³¹ bytes.
    image = tl.program_id(0).to(tl.int64)
    elements = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = elements < size
    channel = elements // pixels
    values = tl.load(slots + tl.load(index + image) * size + elements, mask=inside, other=0)
    to_out = out + image * size + channel * channel_stride + elements % pixels * pixel_stride
    if SCALE:
        scaled = tl.div_rn(values.to(tl.float32), 255.0)
        if NORMALISE:
            shifted = scaled - tl.load(mean + channel, mask=inside, other=0.0)
            scaled = tl.div_rn(shifted, tl.load(std + channel, mask=inside, other=1.0))
        tl.store(to_out, scaled, mask=inside)
    else:
        tl.store(to_out, values, mask=inside)

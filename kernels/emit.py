"""Decoded images become bytes in a ring slot: finite check, keep mask, compaction, clamp, rounding."""

import torch
from streamaug.kernels._backend import Backend, next_power_of_2, on_device, tile, tl, triton, use_triton

from streamaug.errors import UsageError

_ELEMENTS_AT_ONCE = 1 << 18  # of the reference's passes: what they work on stays in the second-level cache


def emit(
    decoded: torch.Tensor, keep: torch.Tensor, out: torch.Tensor, *, backend: Backend = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write the kept and finite images to the front of `out`, in their order; the rest of it stays as it was.

    decoded: float [B, C, H, W] in [-1, 1], contiguous or channels_last. keep: bool [B].
    out: uint8 [B, C, H, W], contiguous: round-half-even(clamp((decoded + 1)·127.5, 0, 255)).
    Returns `order`, int64 [B]: the image at each emitted position, -1 behind the last; `count`, int64 [1].
    Both are on the device, which the Triton kernel does not synchronise. Raises UsageError.
    """
    _check(decoded)
    if keep.dtype != torch.bool or keep.shape != decoded.shape[:1]:
        raise UsageError(f"keep: expected bool [{len(decoded)}], got {keep.dtype} {list(keep.shape)}")
    if out.dtype != torch.uint8 or out.shape != decoded.shape or not out.is_contiguous():
        raise UsageError(f"out: expected contiguous uint8 {list(decoded.shape)}, got {out.dtype} {list(out.shape)}")
    if not use_triton(backend, decoded):
        return _reference(decoded, keep, out)
    batch, channels, height, width = decoded.shape
    order = torch.empty(batch, dtype=torch.int64, device=decoded.device)
    count = torch.zeros(1, dtype=torch.int64, device=decoded.device)
    if decoded.numel() == 0:
        return order, count
    decoded = _flat_order(decoded)
    passed = finite(decoded, backend="triton").logical_and_(keep)
    size = channels * height * width
    block = tile(size)
    with on_device(decoded):
        _emit_kernel[(batch, triton.cdiv(size, block))](
            decoded,
            passed,
            out,
            order,
            count,
            batch,
            size,
            height * width,
            *_strides(decoded),
            BLOCK=block,
            BLOCK_BATCH=next_power_of_2(batch),
        )
    return order, count


def finite(decoded: torch.Tensor, *, backend: Backend = "auto") -> torch.Tensor:
    """bool [B]: which images of decoded, [B, C, H, W] float, have no NaN and no infinity."""
    _check(decoded)
    if not use_triton(backend, decoded) or decoded.numel() == 0:
        return _finite(decoded)
    decoded = _flat_order(decoded)
    passed = torch.empty(len(decoded), dtype=torch.bool, device=decoded.device)
    size = decoded.shape[1:].numel()
    with on_device(decoded):
        _finite_kernel[(len(decoded),)](decoded, passed, size, BLOCK=tile(size))
    return passed


def _check(decoded: torch.Tensor) -> None:
    if not decoded.is_floating_point() or decoded.dim() != 4:
        raise UsageError(f"decoded: expected float [B, C, H, W], got {decoded.dtype} {list(decoded.shape)}")


def _flat_order(decoded: torch.Tensor) -> torch.Tensor:
    """`decoded` in a layout that keeps each image's elements together."""
    dense = decoded.is_contiguous() or decoded.is_contiguous(memory_format=torch.channels_last)
    return decoded if dense else decoded.contiguous()


def _strides(images: torch.Tensor) -> tuple[int, int]:
    """Elements from one channel to the next and from one pixel to the next."""
    channels, pixels = images.shape[1], images.shape[2:].numel()
    return (pixels, 1) if images.is_contiguous() else (1, channels)


def _finite(decoded: torch.Tensor) -> torch.Tensor:
    """0 times a finite value is 0, and nothing else gives 0: a tenth of what `isfinite` takes on a CPU."""
    return (decoded.flatten(1) * 0).sum(1) == 0


def _reference(decoded: torch.Tensor, keep: torch.Tensor, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    chosen = _finite(decoded).logical_and_(keep).nonzero().squeeze(1)
    at_once = max(1, _ELEMENTS_AT_ONCE // max(decoded.shape[1:].numel(), 1))
    for images, target in zip(chosen.split(at_once), out[: len(chosen)].split(at_once), strict=True):
        values = decoded.index_select(0, images).float()
        target.copy_(values.add_(1).mul_(127.5).clamp_(0, 255).round_())
    order = torch.full((len(decoded),), -1, dtype=torch.int64, device=decoded.device)
    order[: len(chosen)] = chosen
    return order, torch.tensor([len(chosen)], device=decoded.device)


@triton.jit
def _finite_kernel(decoded, passed, size, BLOCK: tl.constexpr):
    image = tl.program_id(0).to(tl.int64)
    bad = tl.zeros([BLOCK], tl.int32)
    for start in range(0, size, BLOCK):
        elements = start + tl.arange(0, BLOCK)
        values = tl.load(decoded + image * size + elements, mask=elements < size, other=0.0).to(tl.float32)
        bad |= tl.where(tl.abs(values) < float("inf"), 0, 1)
    tl.store(passed + image, tl.max(bad, 0) == 0)


@triton.jit
def _emit_kernel(
    decoded,
    passed,
    out,
    order,
    count,
    batch,
    size,
    pixels,
    channel_stride,
    pixel_stride,
    BLOCK: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
):
    # Every program counts the images that passed before its own: that is its image's position.
    image = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    others = tl.arange(0, BLOCK_BATCH)
    kept = tl.load(passed + others, mask=others < batch, other=0).to(tl.int64)
    total = tl.sum(kept, 0)
    before = tl.sum(tl.where(others < image, kept, 0), 0)
    emitted = tl.load(passed + image) != 0

    if chunk == 0:
        # An image that did not pass writes one of the -1 behind the last position.
        tl.store(order + tl.where(emitted, before, total + image - before), tl.where(emitted, image, -1))
        if image == 0:
            tl.store(count, total)
    if emitted:
        elements = chunk * BLOCK + tl.arange(0, BLOCK)
        inside = elements < size
        from_decoded = image * size + elements // pixels * channel_stride + elements % pixels * pixel_stride
        values = tl.load(decoded + from_decoded, mask=inside, other=0.0).to(tl.float32)
        values = tl.minimum(tl.maximum((values + 1.0) * 127.5, 0.0), 255.0)
        # Adding 1.5·2²³ leaves no bits below the unit: the sum is rounded half to even.
        values = (values + 12582912.0) - 12582912.0
        tl.store(out + before * size + elements, values.to(tl.uint8), mask=inside)

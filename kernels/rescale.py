"""Rescaled classifier-free guidance: combine both halves, then draw the contrast towards the conditional one's.

    e  = u + guidance·(c - u)
    e' = e·(1 + φ·(std(c)/std(e) - 1))

Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", section 3.4. The standard deviations
are over all elements of an image, which the `step` kernel's tiles never see together.
"""

import torch
from streamaug.kernels._backend import Backend, on_device, tile, tl, triton, use_triton

from streamaug.errors import UsageError


def rescale(model_out: torch.Tensor, guidance: torch.Tensor, phi: float, *, backend: Backend = "auto") -> torch.Tensor:
    """e', fp32 [B, ...] in the layout of `model_out`.

    model_out: any float dtype, [2B, ...], the unconditional half first, contiguous or channels_last.
    guidance: fp32 [B], the scales. phi: φ in [0, 1]; 0 is plain guidance, 1 matches the conditional contrast.
    An image whose guided output is constant is left as it is. Raises UsageError.
    """
    _check(model_out, guidance, phi)
    if not use_triton(backend, model_out):
        return _reference(model_out, guidance, phi)
    if not model_out.is_contiguous() and not (
        model_out.dim() == 4 and model_out.is_contiguous(memory_format=torch.channels_last)
    ):
        model_out = model_out.contiguous()
    batch = len(guidance)
    out = torch.empty_like(model_out[:batch], dtype=torch.float32)
    size = model_out.shape[1:].numel()
    with on_device(model_out):
        _rescale_kernel[(batch,)](model_out, guidance, out, phi, batch, size, BLOCK=tile(size))
    return out


def _check(model_out: torch.Tensor, guidance: torch.Tensor, phi: float) -> None:
    if not model_out.is_floating_point() or model_out.dim() < 2 or len(model_out) % 2:
        raise UsageError(f"model_out: expected float [2B, ...], got {model_out.dtype} {list(model_out.shape)}")
    if guidance.dtype != torch.float32 or guidance.shape != (len(model_out) // 2,) or not guidance.is_contiguous():
        raise UsageError(
            f"guidance: expected contiguous fp32 [{len(model_out) // 2}], got {guidance.dtype} {list(guidance.shape)}"
        )
    if not 0 <= phi <= 1:
        raise UsageError(f"phi is {phi}, accepted is 0 to 1")


def _reference(model_out: torch.Tensor, guidance: torch.Tensor, phi: float) -> torch.Tensor:
    unconditional, conditional = model_out.float().chunk(2)
    axes = tuple(range(1, model_out.dim()))
    guided = torch.lerp(unconditional, conditional, guidance.view(-1, *(1,) * len(axes)))
    spread = guided.std(dim=axes, keepdim=True)
    ratio = torch.where(spread == 0, 1.0, conditional.std(dim=axes, keepdim=True) / spread)
    return guided * (1 + phi * (ratio - 1))


@triton.jit
def _rescale_kernel(model_out, guidance, out, phi, batch, size, BLOCK: tl.constexpr):
    # Offsets are int64: the halves may hold more than 2^31 elements.
    image = tl.program_id(0).to(tl.int64)
    scale = tl.load(guidance + image)
    unconditional = model_out + image * size
    conditional = model_out + (batch + image) * size
    sum_c, sum_e = 0.0, 0.0
    for begin in range(0, size, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        u = tl.load(unconditional + at, mask=at < size, other=0.0).to(tl.float32)
        c = tl.load(conditional + at, mask=at < size, other=0.0).to(tl.float32)
        sum_c += tl.sum(c, 0)
        sum_e += tl.sum(u + scale * (c - u), 0)
    mean_c, mean_e = sum_c / size, sum_e / size
    # Squares of what is left of the mean: nothing cancels.
    square_c, square_e = 0.0, 0.0
    for begin in range(0, size, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        inside = at < size
        u = tl.load(unconditional + at, mask=inside, other=0.0).to(tl.float32)
        c = tl.load(conditional + at, mask=inside, other=0.0).to(tl.float32)
        off_c = tl.where(inside, c - mean_c, 0.0)
        off_e = tl.where(inside, u + scale * (c - u) - mean_e, 0.0)
        square_c += tl.sum(off_c * off_c, 0)
        square_e += tl.sum(off_e * off_e, 0)
    # The standard deviations' common divisor cancels in their ratio.
    ratio = tl.where(square_e == 0.0, 1.0, tl.sqrt(square_c) / tl.sqrt(square_e))
    factor = 1.0 + phi * (ratio - 1.0)
    for begin in range(0, size, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        inside = at < size
        u = tl.load(unconditional + at, mask=inside, other=0.0).to(tl.float32)
        c = tl.load(conditional + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + image * size + at, (u + scale * (c - u)) * factor, mask=inside)

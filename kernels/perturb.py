"""Orders become starting points: gather up to two bank rows, mix them, add noise and cast, in one pass."""

from collections.abc import Callable

import numpy as np
import torch
from streamaug.kernels._backend import Backend, on_device, tile, tl, triton, use_triton
from streamaug.kernels.philox import _normal4, check_ids, check_out, normal, pack_counter, signed64

from streamaug.errors import UsageError

_CHUNK_ELEMENTS = 2**20  # the reference needs a few times this much memory, however large the batch


def perturb(
    bank: torch.Tensor,
    row_a: torch.Tensor,
    row_b: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    *,
    seed: int,
    stream: int = 0,
    dtype: torch.dtype = torch.float32,
    out: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """out[n] = w[n, 0]·bank[row_a[n]] + w[n, 1]·bank[row_b[n]] + w[n, 2]·ξ(seed, stream, step 0, ids[n]).

    bank: [R, *shape], fp16, bf16 or fp32, contiguous (a memory-mapped one is read only at the rows used).
    row_a, row_b: int64 [N], -1 for none: its weight is ignored. weights: fp32 [N, 3]. ids: int64 [N].
    Returns `out` or a new tensor [N, *shape] of `dtype`. Raises UsageError. Row numbers are trusted on CUDA.
    """
    count, shape = row_a.shape[0], bank.shape[1:]
    _check(bank, row_a, row_b, weights, ids, count)
    if out is None:
        out = torch.empty((count, *shape), dtype=dtype, device=bank.device)
    else:
        check_out(out, (count, *shape), dtype, bank.device)
        if not out.is_contiguous():
            raise UsageError("out: expected a contiguous tensor")
    size = shape.numel()
    if count == 0 or size == 0:
        return out
    if use_triton(backend, bank):
        block = tile(size)
        with on_device(bank):
            _perturb_kernel[(count, triton.cdiv(size, block))](
                out,
                bank,
                row_a,
                row_b,
                weights,
                ids,
                signed64(seed),
                pack_counter(stream, 0),
                size,
                BLOCK=block,
            )
    else:
        _reference(out.view(count, size), bank.view(-1, size), row_a, row_b, weights, ids, seed, stream)
    return out


def _check(
    bank: torch.Tensor,
    row_a: torch.Tensor,
    row_b: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    count: int,
) -> None:
    if not (bank.is_floating_point() and bank.is_contiguous() and bank.dim() > 1):
        raise UsageError(
            f"bank: expected a contiguous fp16, bf16 or fp32 [R, ...], got {bank.dtype} {list(bank.shape)}"
        )
    check_ids(ids, count)
    check_ids(row_a, count, "row_a")
    check_ids(row_b, count, "row_b")
    if weights.dtype != torch.float32 or weights.shape != (count, 3) or not weights.is_contiguous():
        raise UsageError(f"weights: expected contiguous fp32 [{count}, 3], got {weights.dtype} {list(weights.shape)}")


def _reference(
    out: torch.Tensor,
    bank: torch.Tensor,
    row_a: torch.Tensor,
    row_b: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    seed: int,
    stream: int,
) -> None:
    """`perturb` with images as rows: out [N, elements], bank [R, elements]."""
    host = weights.cpu().numpy()
    terms = [
        term
        for term in (
            _row_term(bank, row_a, host[:, 0]),
            _row_term(bank, row_b, host[:, 1]),
            _noise_term(ids, host[:, 2], out.shape[1:], seed, stream),
        )
        if term is not None
    ]
    if not terms:
        out.zero_()
    step = max(_CHUNK_ELEMENTS // out.shape[1], 1)
    for start in range(0, len(out) if terms else 0, step):
        part = slice(start, start + step)
        target = out[part]
        total = target if out.dtype == torch.float32 else torch.empty_like(target, dtype=torch.float32)
        (first, weight), *others = terms
        first(part, total)
        total.mul_(weight if isinstance(weight, float) else weight[part])
        values = torch.empty_like(total) if others else total
        for fill, weight in others:
            fill(part, values)
            if isinstance(weight, float):
                total.add_(values, alpha=weight)
            else:
                total.addcmul_(values, weight[part])
        if total is not target:
            target.copy_(total)


# How to write some images' values into an fp32 [n, elements], and their weight: one number or [N, 1].
_Weight = float | torch.Tensor
_Term = tuple[Callable[[slice, torch.Tensor], object], _Weight]


def _row_term(bank: torch.Tensor, rows: torch.Tensor, weight: np.ndarray) -> _Term | None:
    """The bank rows and their weight; None when no image has a row."""
    host = rows.cpu().numpy()
    low, high = int(host.min()), int(host.max())
    if high >= len(bank) or low < -1:
        raise UsageError(f"rows {low}..{high}: the bank has rows 0..{len(bank) - 1}, and -1 stands for none")
    if high < 0:
        return None
    if low >= 0:
        return lambda part, into: into.copy_(bank.index_select(0, rows[part])), _weight(weight, bank.device)
    missing = (rows < 0)[:, None]
    safe_rows = rows.clamp(min=0)

    def fill(part: slice, into: torch.Tensor) -> None:
        into.copy_(bank.index_select(0, safe_rows[part])).masked_fill_(missing[part], 0)

    return fill, _weight(np.where(host < 0, 0, weight), bank.device)


def _noise_term(ids: torch.Tensor, weight: np.ndarray, shape: torch.Size, seed: int, stream: int) -> _Term | None:
    """The noise and its weight; None when every weight is 0."""
    if not weight.any():
        return None

    def fill(part: slice, into: torch.Tensor) -> None:
        normal(ids[part], shape, seed=seed, stream=stream, out=into, backend="torch")

    return fill, _weight(weight, ids.device)


def _weight(values: np.ndarray, device: torch.device) -> _Weight:
    """One number when all images have the same weight: twice as fast to apply as [N, 1]."""
    if (values == values[0]).all():
        return float(values[0])
    return torch.from_numpy(np.ascontiguousarray(values)).to(device)[:, None]


@triton.jit(do_not_specialize=["seed", "counter_word"])
def _perturb_kernel(
    out,
    bank,
    row_a,
    row_b,
    weights,
    ids,
    seed: tl.int64,
    counter_word: tl.int64,
    size,
    BLOCK: tl.constexpr,
):
    # Image and row numbers are int64: a bank may have more than 2³¹ elements.
    image = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    elements = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = elements < size
    a = tl.load(row_a + image)
    b = tl.load(row_b + image)
    weight_a = tl.where(a >= 0, tl.load(weights + 3 * image), 0.0)
    weight_b = tl.where(b >= 0, tl.load(weights + 3 * image + 1), 0.0)
    weight_noise = tl.load(weights + 3 * image + 2)
    inside_a = elements < tl.where(a >= 0, size, 0)
    inside_b = elements < tl.where(b >= 0, size, 0)
    values_a = tl.load(bank + a * size + elements, mask=inside_a, other=0.0).to(tl.float32)
    values_b = tl.load(bank + b * size + elements, mask=inside_b, other=0.0).to(tl.float32)
    mixed = weight_a * values_a + weight_b * values_b
    if weight_noise != 0.0:
        blocks = chunk * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
        mixed += weight_noise * _normal4(seed, blocks, counter_word, tl.load(ids + image))
    tl.store(out + image * size + elements, mixed, mask=inside)

"""Orders become starting points: gather up to two bank rows, mix them, add noise and cast, in one pass."""

from collections.abc import Callable

import torch
from streamaug.kernels._backend import Backend, on_device, tile, tl, triton, use_triton
from streamaug.kernels.philox import _normal4, check_ids, check_out, normal, pack_counter, signed64

from streamaug.errors import UsageError

_CHUNK_ELEMENTS = 131072  # of an fp32 intermediate of the reference: it stays in the second-level cache


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
        raise UsageError(
            f"weights: expected contiguous fp32 [{count}, 3], got {weights.dtype} {list(weights.shape)}"
        )


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
    terms = [
        term
        for term in (
            _row_term(bank, row_a, weights[:, 0]),
            _row_term(bank, row_b, weights[:, 1]),
            _noise_term(ids, weights[:, 2], out.shape[1:], seed, stream),
        )
        if term is not None
    ]
    if not terms:
        out.zero_()
        return
    step = min(max(_CHUNK_ELEMENTS // out.shape[1], 1), len(out))
    scratch = torch.empty((2, step, out.shape[1]), dtype=torch.float32, device=out.device)
    for start in range(0, len(out), step):
        part = slice(start, min(start + step, len(out)))
        target = out[part]
        total = target if out.dtype == torch.float32 else scratch[0, : len(target)]
        for position, (fill, scale) in enumerate(terms):
            weight = scale if isinstance(scale, float) else scale[part]
            if position == 0:
                fill(part, total)
                total.mul_(weight)
                continue
            values = scratch[1, : len(target)]
            fill(part, values)
            if isinstance(weight, float):
                total.add_(values, alpha=weight)
            else:
                total.addcmul_(values, weight)
        if total is not target:
            target.copy_(total)


# How to write some images' values into an fp32 [n, elements], and their weight: one number or [N, 1].
_Term = tuple[Callable[[slice, torch.Tensor], object], float | torch.Tensor]


def _row_term(bank: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor) -> _Term | None:
    """The bank rows and their weight; None when no image has a row."""
    low, high = (int(bound) for bound in torch.aminmax(rows))
    if high >= len(bank) or low < -1:
        raise UsageError(f"rows {low}..{high}: the bank has rows 0..{len(bank) - 1}, and -1 stands for none")
    if high < 0:
        return None
    if low >= 0:
        return lambda part, into: into.copy_(bank.index_select(0, rows[part])), _scale(weight)
    missing = (rows < 0)[:, None]
    safe_rows = rows.clamp(min=0)

    def fill(part: slice, into: torch.Tensor) -> None:
        into.copy_(bank.index_select(0, safe_rows[part])).masked_fill_(missing[part], 0)

    return fill, weight[:, None].masked_fill(missing, 0)


def _noise_term(
    ids: torch.Tensor, weight: torch.Tensor, shape: torch.Size, seed: int, stream: int
) -> _Term | None:
    """The noise and its weight; None when every weight is 0."""
    if not weight.any():
        return None

    def fill(part: slice, into: torch.Tensor) -> None:
        normal(ids[part], shape, seed=seed, stream=stream, out=into, backend="torch")

    return fill, _scale(weight)


def _scale(weight: torch.Tensor) -> float | torch.Tensor:
    """One number when all images have the same weight, else [N, 1]: a scalar is twice as fast to apply."""
    low, high = (float(bound) for bound in torch.aminmax(weight))
    return low if low == high else weight[:, None]


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

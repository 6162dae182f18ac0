"""Orders become starting points: gather up to two bank rows, mix them, add noise and cast, in one pass."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from streamaug.kernels._backend import Backend, on_device, tile, tl, triton, use_triton
from streamaug.kernels.philox import _normal4, check_ids, check_out, normal, pack_counter, signed64

from streamaug.errors import UsageError

_CHUNK_ELEMENTS = 2**20  # the reference needs a few times this much memory, however large the batch
_BAG_ELEMENTS = 2**13  # of a row, up to which torch's embedding_bag is faster than gather and multiply


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

    On a CPU an fp32 bank is several times faster than a half-precision one: gather, weight and sum are then one pass.
    """
    count, shape = row_a.shape[0], bank.shape[1:]
    _check(bank, row_a, row_b, weights, ids, count)
    if out is not None:
        check_out(out, (count, *shape), dtype, bank.device)
        if not out.is_contiguous():
            raise UsageError("out: expected a contiguous tensor")
    size = shape.numel()
    triton_runs = use_triton(backend, bank)
    bag = out is None and dtype == bank.dtype == torch.float32 and 0 < size <= _BAG_ELEMENTS and bool(len(bank))
    if bag and count and not triton_runs:
        return _reference_bag(bank.view(-1, size), row_a, row_b, weights, ids, seed, stream).view(count, *shape)
    if out is None:
        out = torch.empty((count, *shape), dtype=dtype, device=bank.device)
    if count == 0 or size == 0:
        return out
    if triton_runs:
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


def _reference_bag(
    bank: torch.Tensor,
    row_a: torch.Tensor,
    row_b: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    seed: int,
    stream: int,
) -> torch.Tensor:
    """`perturb` of an fp32 bank [R, elements] as a bag of one or two weighted rows an image: [N, elements]."""
    (low_a, _), (low_b, high_b) = (_check_rows(each, len(bank)) for each in (row_a, row_b))
    single = high_b < 0
    rows = row_a[:, None] if single else torch.stack([row_a, row_b], 1)
    weight = weights[:, :1] if single else weights[:, :2]
    nothing = None
    if low_a < 0 or (low_b < 0 and not single):
        # Where there is no row the other one stands in with weight 0, so that nothing else is read.
        missing = rows < 0
        nothing = missing.all(1)
        weight = torch.where(missing, 0.0, weight)
        rows = torch.where(missing, rows.amax(1, keepdim=True), rows).clamp(min=0)
    bags = _bags(*rows.shape, bank.device)
    # The function under `torch.nn.functional.embedding_bag`, whose checks take as long as a small bag.
    out = torch.embedding_bag(bank, rows.view(-1), bags, False, 0, False, weight.contiguous().view(-1), True)[0]
    if nothing is not None:
        out[nothing] = 0.0
    low, high = torch.aminmax(weights[:, 2])  # a third faster than any()
    if low or high:
        step = max(_CHUNK_ELEMENTS // out.shape[1], 1)
        for start in range(0, len(out), step):
            part = slice(start, start + step)
            noise = normal(ids[part], out.shape[1:], seed=seed, stream=stream, backend="torch")
            out[part].addcmul_(noise, weights[part, 2:])
    return out


@lru_cache(maxsize=8)
def _bags(count: int, each: int, device: torch.device) -> torch.Tensor:
    """Where `count` bags of `each` rows begin, and where the last ends: int64 [count + 1], not to be changed."""
    return torch.arange(0, count * each + 1, each, device=device)


def _check_rows(rows: torch.Tensor, count: int) -> tuple[int, int]:
    """The lowest and the highest row asked for. Raises UsageError for one the bank has not."""
    low, high = (int(value) for value in torch.aminmax(rows))
    if high >= count or low < -1:
        raise UsageError(f"rows {low}..{high}: the bank has rows 0..{count - 1}, and -1 stands for none")
    return low, high


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
    low, high = _check_rows(rows, len(bank))
    if high < 0:
        return None
    if low >= 0:
        return lambda part, into: _gather(bank, rows[part], into), _weight(weight, bank.device)
    missing = (rows < 0)[:, None]
    safe_rows = rows.clamp(min=0)

    def fill(part: slice, into: torch.Tensor) -> None:
        _gather(bank, safe_rows[part], into)
        into.masked_fill_(missing[part], 0)

    return fill, _weight(np.where(rows.cpu().numpy() < 0, 0, weight), bank.device)


def _gather(bank: torch.Tensor, rows: torch.Tensor, into: torch.Tensor) -> None:
    """The bank's rows, as fp32."""
    if bank.dtype == torch.float32:
        torch.index_select(bank, 0, rows, out=into)
    else:
        into.copy_(bank.index_select(0, rows))


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

"""One solver step of a whole batch in one pass: guidance, update, history, noise and the next network input.

    e  = u + guidance·(c - u)                  when guided, else the network's output
    m0 = clamp(a·x + s·e, ±clip)
    x' = cx·x + ce·e + c0·m0 + c1·m1 + c2·m2 + c3·m3 + c4·m4 + cn·ξ
    network input = in_next·x'

m1 to m4 are the m0 of one to four evaluations ago. The coefficients come from a table on the device, indexed
by a counter on the device, so that one captured CUDA graph replays every step.
"""

from enum import IntEnum

import torch
from streamaug.kernels._backend import Backend, on_device, tile, tl, triton, use_triton
from streamaug.kernels.philox import _normal4, check_ids, normal, pack_counter, signed64

from streamaug.errors import UsageError

HISTORY = 5  # slots of the history ring: m0, m1, ..., m4


class Column(IntEnum):
    """Columns of the coefficient table [evaluations, B, len(Column)]."""

    A = 0
    S = 1
    CX = 2
    CE = 3
    C0 = 4
    C1 = 5
    C2 = 6
    CN = 7
    IN_NEXT = 8
    GUIDANCE = 9
    C3 = 10
    C4 = 11


_ALWAYS = (Column.A, Column.S, Column.IN_NEXT, Column.GUIDANCE)


class Columns:
    """Which columns of a table are not 0 everywhere (`Column.CN in columns`), with the reference's views.

    Values may be rewritten in `coef` afterwards, but columns that were 0 in the whole table must stay 0.
    """

    def __init__(self, coef: torch.Tensor):
        self.coef = coef
        used = (coef != 0).flatten(0, -2).any(0).tolist()
        self._used = frozenset(column for column in Column if used[column])
        self._rows: dict[tuple[int, int], list] = {}

    def __contains__(self, column: Column) -> bool:
        return column in self._used

    def row(self, evaluation: int, dim: int) -> list:
        """For each Column its values [B, 1, ...] with `dim` axes, None if not used; views, made once."""
        row = self._rows.get((evaluation, dim))
        if row is None:
            values = _views(self.coef, evaluation, dim)
            kept = self._used.union(_ALWAYS)
            row = [view if column in kept else None for column, view in zip(Column, values, strict=True)]
            self._rows[evaluation, dim] = row
        return row


def used_columns(coef: torch.Tensor) -> Columns:
    """Reads the table, which synchronises a device: call it once, where the table is built."""
    return Columns(coef)


def _views(coef: torch.Tensor, evaluation: int, dim: int) -> list[torch.Tensor]:
    row = coef[evaluation]
    return list(row.view(*row.shape, *(1,) * (dim - 1)).unbind(1))


def step(
    x: torch.Tensor,
    model_out: torch.Tensor,
    coef: torch.Tensor,
    index: torch.Tensor,
    history: torch.Tensor,
    net_in: torch.Tensor,
    ids: torch.Tensor,
    *,
    seed: int,
    stream: int = 1,
    guided: bool,
    clip: float | None,
    noisy: bool,
    columns: Columns | None = None,
    backend: Backend = "auto",
) -> None:
    """Advance x by one evaluation, in place; also writes m0 into `history` and the next input into `net_in`.

    x: fp32 [B, *shape], contiguous.
    model_out: any float dtype, [B, *shape], or [2B, *shape] when guided, the unconditional half first.
    coef: fp32 [E, B, len(Column)].
    index: int64 [1], the evaluation now, 0..E-1, at most 65535; not advanced.
    history: fp32 [5, B, *shape], contiguous. m0 goes to slot index mod 5. A slot of weight 0 is not read.
    net_in: any float dtype, [B, *shape] or [2B, *shape] (gets the input twice), contiguous or channels_last.
    ids: int64 [B]; ξ is the normal of (seed, stream, step index, id), drawn only when `noisy`.
    clip: bound of m0, or None.
    columns: `used_columns(coef)`, kept as long as the table: the reference then skips the other columns, and
        writes m0 only if one of C0 to C4 is used. Triton decides image by image.
    The Triton kernel does not synchronise the device. Raises UsageError.
    """
    _check(x, model_out, coef, index, history, net_in, ids, guided)
    if not use_triton(backend, x):
        _reference(x, model_out, coef, index, history, net_in, ids, seed, stream, guided, clip, noisy, columns)
        return
    out_strides, in_strides = _strides(model_out), _strides(net_in)
    if out_strides is None:
        model_out = model_out.contiguous()
        out_strides = model_out.shape[2:].numel(), 1
    if in_strides is None:
        raise UsageError("net_in: expected a contiguous or channels_last tensor")
    batch, size = x.shape[0], x.shape[1:].numel()
    block = tile(size)
    with on_device(x):
        _step_kernel[(batch, triton.cdiv(size, block))](
            x,
            model_out,
            coef,
            index,
            history,
            net_in,
            ids,
            signed64(seed),
            pack_counter(stream, 0),
            0.0 if clip is None else float(clip),
            batch,
            size,
            x.shape[2:].numel(),
            out_strides[0],
            out_strides[1],
            in_strides[0],
            in_strides[1],
            GUIDED=guided,
            TWICE=net_in.shape[0] == 2 * batch,
            CLIP=clip is not None,
            NOISY=noisy,
            BLOCK=block,
        )


def _check(
    x: torch.Tensor,
    model_out: torch.Tensor,
    coef: torch.Tensor,
    index: torch.Tensor,
    history: torch.Tensor,
    net_in: torch.Tensor,
    ids: torch.Tensor,
    guided: bool,
) -> None:
    shape = x.shape
    batch, image = shape[0], shape[1:]
    if x.dtype != torch.float32 or not x.is_contiguous():
        raise UsageError(f"x: expected contiguous fp32 [B, ...], got {x.dtype} {list(shape)}")
    if model_out.shape != (batch * (2 if guided else 1), *image):
        raise UsageError(
            f"model_out: expected {[batch * (2 if guided else 1), *image]} for x {list(shape)} "
            f"{'with' if guided else 'without'} guidance, got {list(model_out.shape)}"
        )
    if net_in.shape[1:] != image or net_in.shape[0] not in (batch, 2 * batch):
        raise UsageError(f"net_in: expected [{batch} or {2 * batch}, *{list(image)}], got {list(net_in.shape)}")
    if history.shape != (HISTORY, *shape) or history.dtype != torch.float32 or not history.is_contiguous():
        raise UsageError(
            f"history: expected contiguous fp32 {[HISTORY, *shape]}, got {history.dtype} {list(history.shape)}"
        )
    if coef.dtype != torch.float32 or coef.shape[1:] != (batch, len(Column)) or not coef.is_contiguous():
        raise UsageError(
            f"coef: expected contiguous fp32 [E, {batch}, {len(Column)}], got {coef.dtype} {list(coef.shape)}"
        )
    if index.dtype != torch.int64 or index.shape != (1,):
        raise UsageError(f"index: expected int64 [1], got {index.dtype} {list(index.shape)}")
    check_ids(ids, batch)


def _strides(images: torch.Tensor) -> tuple[int, int] | None:
    """Elements from one channel to the next and from one pixel to the next; None for any other layout."""
    if images.is_contiguous():
        return images.shape[2:].numel(), 1
    if images.dim() == 4 and images.is_contiguous(memory_format=torch.channels_last):
        return 1, images.shape[1]
    return None


def _reference(
    x: torch.Tensor,
    model_out: torch.Tensor,
    coef: torch.Tensor,
    index: torch.Tensor,
    history: torch.Tensor,
    net_in: torch.Tensor,
    ids: torch.Tensor,
    seed: int,
    stream: int,
    guided: bool,
    clip: float | None,
    noisy: bool,
    columns: Columns | None,
) -> None:
    batch, evaluation = x.shape[0], int(index)
    if columns is not None and columns.coef is coef:
        row = columns.row(evaluation, x.dim())
    else:
        row = _views(coef, evaluation, x.dim())
    a, s, cx, ce, c0, c1, c2, cn, in_next, guidance, c3, c4 = row
    e = model_out = model_out.float()
    if guided:
        unconditional, conditional = model_out.chunk(2)
        e = torch.lerp(unconditional, conditional, guidance)
    m0 = history[evaluation % HISTORY]
    if c0 is not None or c1 is not None or c2 is not None or c3 is not None or c4 is not None:
        torch.mul(x, a, out=m0).addcmul_(e, s)
        if clip is not None:
            m0.clamp_(-clip, clip)

    if cx is not None:
        x.mul_(cx)
        if ce is not None:
            x.addcmul_(e, ce)
    elif ce is not None:
        torch.mul(e, ce, out=x)
    else:
        x.zero_()
    if c0 is not None:
        x.addcmul_(m0, c0)
    if c1 is not None:
        _add_live(x, history[(evaluation - 1) % HISTORY], c1)
    if c2 is not None:
        _add_live(x, history[(evaluation - 2) % HISTORY], c2)
    if c3 is not None:
        _add_live(x, history[(evaluation - 3) % HISTORY], c3)
    if c4 is not None:
        _add_live(x, history[(evaluation - 4) % HISTORY], c4)
    if noisy and cn is not None and cn.any():
        noise = normal(ids, x.shape[1:], seed=seed, stream=stream, step=evaluation, backend="torch")
        x.addcmul_(noise, cn)

    if net_in.shape[0] == batch:
        torch.mul(x, in_next, out=net_in)
    else:
        first, second = net_in.chunk(2)
        second.copy_(torch.mul(x, in_next, out=first))


def _add_live(x: torch.Tensor, values: torch.Tensor, weight: torch.Tensor) -> None:
    """x += weight·values, without reading the values of images whose weight is 0."""
    live = int(weight.count_nonzero())
    if live == len(weight):
        x.addcmul_(values, weight)
    elif live:
        x.addcmul_(values.masked_fill(weight == 0, 0), weight)


@triton.jit(do_not_specialize=["seed", "counter_word"])
def _step_kernel(
    x,
    model_out,
    coef,
    index,
    history,
    net_in,
    ids,
    seed: tl.int64,
    counter_word: tl.int64,
    clip,
    batch,
    size,
    pixels,
    out_channel_stride,
    out_pixel_stride,
    in_channel_stride,
    in_pixel_stride,
    GUIDED: tl.constexpr,
    TWICE: tl.constexpr,
    CLIP: tl.constexpr,
    NOISY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Offsets are int64: history holds 5·B images.
    image = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    elements = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = elements < size
    channel = elements // pixels
    pixel = elements % pixels

    evaluation = tl.load(index)
    row = coef + (evaluation * batch + image) * 12  # the columns are those of `Column`
    a = tl.load(row)
    s = tl.load(row + 1)
    cx = tl.load(row + 2)
    ce = tl.load(row + 3)
    c0 = tl.load(row + 4)
    c1 = tl.load(row + 5)
    c2 = tl.load(row + 6)
    cn = tl.load(row + 7)
    in_next = tl.load(row + 8)
    c3 = tl.load(row + 10)
    c4 = tl.load(row + 11)

    here = image * size + elements
    from_model = model_out + image * size + channel * out_channel_stride + pixel * out_pixel_stride
    old = tl.load(x + here, mask=inside, other=0.0)
    e = tl.load(from_model, mask=inside, other=0.0).to(tl.float32)
    if GUIDED:
        offset = (image * 0 + batch) * size
        conditional = tl.load(from_model + offset, mask=inside, other=0.0).to(tl.float32)
        e += tl.load(row + 9) * (conditional - e)

    m0 = a * old + s * e
    if CLIP:
        # A NaN must stay one: `emit` rejects the image by it.
        m0 = tl.maximum(m0, -clip, propagate_nan=tl.PropagateNan.ALL)
        m0 = tl.minimum(m0, clip, propagate_nan=tl.PropagateNan.ALL)
    slot = batch * (image * 0 + size)
    inside1 = elements < tl.where(c1 != 0.0, size, 0)
    inside2 = elements < tl.where(c2 != 0.0, size, 0)
    inside3 = elements < tl.where(c3 != 0.0, size, 0)
    inside4 = elements < tl.where(c4 != 0.0, size, 0)
    m1 = tl.load(history + (evaluation + 4) % 5 * slot + here, mask=inside1, other=0.0)
    m2 = tl.load(history + (evaluation + 3) % 5 * slot + here, mask=inside2, other=0.0)
    m3 = tl.load(history + (evaluation + 2) % 5 * slot + here, mask=inside3, other=0.0)
    m4 = tl.load(history + (evaluation + 1) % 5 * slot + here, mask=inside4, other=0.0)
    new = cx * old + ce * e + c0 * m0 + c1 * m1 + c2 * m2 + c3 * m3 + c4 * m4
    if NOISY and cn != 0.0:
        blocks = chunk * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
        new += cn * _normal4(seed, blocks, counter_word | evaluation, tl.load(ids + image))

    tl.store(history + evaluation % 5 * slot + here, m0, mask=inside)
    tl.store(x + here, new, mask=inside)
    to_net = net_in + image * size + channel * in_channel_stride + pixel * in_pixel_stride
    tl.store(to_net, in_next * new, mask=inside)
    if TWICE:
        tl.store(to_net + (image * 0 + batch) * size, in_next * new, mask=inside)

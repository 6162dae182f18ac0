"""Counter-based normals: the noise ξ of every order, the same in any batch, producer, device or restart.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) has the key (seed low,
seed high) and the counter (element // 4, stream << 16 | step, id low, id high), 32 bits each. Its four words
give four normals by Box-Muller: with u = (r0 mod 2^31 + 1/2) / 2^31, ρ = sqrt(-2 ln u) and
θ = 2π int32(r1) / 2^32 the first two are ρ cos θ and ρ sin θ; r2 and r3 give the other two.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy import bitwise_and, bitwise_xor, left_shift, multiply, right_shift
from streamaug.kernels._backend import Backend, on_device, tile, tl, triton, use_triton

from streamaug.errors import UsageError

_ROUNDS = 10
_WEYL_A, _WEYL_B = 0x9E3779B9, 0xBB67AE85
# Zero-dimensional arrays: numpy takes a quarter of a microsecond less for those than for its scalars.
_A, _B = np.array(0xD2511F53, np.uint64), np.array(0xCD9E8D57, np.uint64)
_HALF = np.array(32, np.uint64)
_LOW, _HIGH = np.array(2**32 - 1, np.uint64), np.array(2**64 - 2**32, np.uint64)
_CLEAR_SIGN = np.array(2**63 - 1, np.uint64)
_UNIT, _HALF_UNIT, _MINUS_TWO = (np.array(value, np.float32) for value in (2**-31, 2**-32, -2.0))
_RADIANS = np.array(2 * math.pi / 2**32, np.float32)
_CHUNK_BLOCKS = 16384  # counters computed at a time: the working set stays in the second-level cache


def normal(
    ids: torch.Tensor,
    shape: Sequence[int],
    *,
    seed: int,
    stream: int,
    step: int = 0,
    dtype: torch.dtype = torch.float32,
    out: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Standard normals that depend on (seed, stream, step, id, position in the image) and on nothing else.

    ids: int64 [N]. Returns `out` or a new tensor [N, *shape] of `dtype`, computed in fp32. The low 64 bits of
    `seed` count; stream and step: 0..65535. An image has at most 2³¹ elements. Raises UsageError.
    """
    count, size = ids.shape[0], math.prod(shape)
    check_ids(ids, count)
    counter_word = pack_counter(stream, step)
    if out is None:
        out = torch.empty((count, *shape), dtype=dtype, device=ids.device)
    else:
        check_out(out, (count, *shape), dtype, ids.device)
    if count == 0 or size == 0:
        return out
    if use_triton(backend, ids):
        block = tile(size)
        flat = out if out.is_contiguous() else torch.empty(out.shape, dtype=dtype, device=ids.device)
        with on_device(ids):
            _normal_kernel[(count, triton.cdiv(size, block))](
                flat, ids, signed64(seed), counter_word, size, BLOCK=block
            )
        return out if flat is out else out.copy_(flat)
    if dtype == torch.float32 and not out.is_cuda and out.is_contiguous():
        fill_normal(out.numpy().reshape(count, size), ids.numpy(), seed, counter_word)
        return out
    noise = np.empty((count, size), np.float32)
    fill_normal(noise, ids.cpu().numpy(), seed, counter_word)
    return out.copy_(torch.from_numpy(noise).view(out.shape))


def bits(
    ids: torch.Tensor,
    blocks: int,
    *,
    seed: int,
    stream: int,
    step: int = 0,
    first_block: int = 0,
    backend: Backend = "auto",
) -> torch.Tensor:
    """The random words behind `normal`, from block `first_block` on: int64 [N, blocks, 4], each below 2³²."""
    check_ids(ids, ids.shape[0])
    counter_word = pack_counter(stream, step)
    if not 0 <= first_block <= first_block + blocks <= 2**32:
        raise UsageError(f"blocks {first_block}..{first_block + blocks}: expected a range within 0..2^32")
    if use_triton(backend, ids):
        result = torch.empty(len(ids), blocks, 4, dtype=torch.int64, device=ids.device)
        block = tile(blocks)
        with on_device(ids):
            _bits_kernel[(len(ids), triton.cdiv(blocks, block))](
                result, ids, signed64(seed), counter_word, first_block, blocks, BLOCK=block
            )
        return result
    state = _philox(ids.cpu().numpy(), first_block, first_block + blocks, seed, counter_word)
    words = np.stack([state[0] >> 32, state[0] & 0xFFFFFFFF, state[1] >> 32, state[1] & 0xFFFFFFFF], axis=-1)
    return torch.from_numpy(words.view(np.int64)).to(ids.device)


def pack_counter(stream: int, step: int) -> int:
    """The counter's second word. Raises UsageError unless stream and step are in 0..65535."""
    if not (0 <= stream < 65536 and 0 <= step < 65536):
        raise UsageError(f"stream {stream}, step {step}: each is a whole number in 0..65535")
    return stream << 16 | step


def signed64(seed: int) -> int:
    """The seed's low 64 bits as a signed number, so that a kernel's argument always has one type."""
    return ((seed + 2**63) & (2**64 - 1)) - 2**63


def fill_normal(out: np.ndarray, ids: np.ndarray, seed: int, counter_word: int) -> None:
    """The reference: fills `out`, fp32 [N, elements], contiguous; ids int64 [N]."""
    rows, size = out.shape
    blocks = -(-size // 4)
    chunk_rows = max(_CHUNK_BLOCKS // blocks, 1)
    chunk_blocks = min(blocks, _CHUNK_BLOCKS)
    for row in range(0, rows, chunk_rows):
        for block in range(0, blocks, chunk_blocks):
            last = min(block + chunk_blocks, blocks)
            target = out[row : row + chunk_rows, 4 * block : min(4 * last, size)]
            state = _philox(ids[row : row + chunk_rows], block, last, seed, counter_word)
            if target.flags.c_contiguous and target.shape[1] == 4 * (last - block):
                _box_muller(state, target)
            else:
                whole = np.empty((len(target), 4 * (last - block)), np.float32)
                _box_muller(state, whole)
                target[:] = whole[:, : target.shape[1]]


def _philox(ids: np.ndarray, first: int, last: int, seed: int, counter_word: int) -> np.ndarray:
    """uint64 [2, N, last - first]: r0 << 32 | r1 and r2 << 32 | r3 for every id and block in first..last - 1.

    Two words are kept in one: with a = c0 << 32 | c1 and b = c2 << 32 | c3, a round of Philox is
        a' = B·(b >> 32) ^ a << 32 ^ ka << 32,     b' = A·(a >> 32) ^ b << 32 ^ kb << 32.
    Every second round puts the key of the next one into the low half too: the next shift moves it up.
    """
    keys_a, keys_b = _keys(seed)
    words = ids.view(np.uint64).reshape(-1, 1)
    shape = (2, len(ids), last - first)
    state = np.empty(shape, np.uint64)

    # Rounds 0 and 1: until a and b have mixed, most of the work depends on the id or on the block alone.
    a, b = state
    id_a = (words & _LOW) * _B
    bitwise_xor(id_a, np.array(int(keys_a[0]) ^ counter_word << 32, np.uint64), id_a)
    id_b = words & _HIGH
    bitwise_xor(id_b, keys_b[0], id_b)
    bitwise_xor(_block_products(first, last), id_b, b)
    right_shift(b, _HALF, a)
    multiply(a, _B, a)
    bitwise_xor(a, id_a << _HALF, a)
    left_shift(b, _HALF, b)
    bitwise_xor(b, (id_a >> _HALF) * _A, b)

    flat = state.reshape(2, -1)
    product = np.empty_like(flat)
    (a, b), (product_a, product_b) = flat, product
    for turn in range(2, _ROUNDS):
        right_shift(flat, _HALF, product)
        left_shift(flat, _HALF, flat)
        multiply(product_a, _A, product_a)
        multiply(product_b, _B, product_b)
        bitwise_xor(a, product_b, a)
        bitwise_xor(b, product_a, b)
        if turn % 2 == 0:
            bitwise_xor(a, keys_a[turn // 2], a)
            bitwise_xor(b, keys_b[turn // 2], b)
    return state


@functools.lru_cache(maxsize=4)
def _block_products(first: int, last: int) -> np.ndarray:
    return np.arange(first, last, dtype=np.uint64) * _A


@functools.lru_cache(maxsize=16)
def _keys(seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """For a and b: the keys of rounds 0, 2, 4, ... in the high half, those of the rounds after in the low."""

    def pairs(word: int, weyl: int) -> list[np.ndarray]:
        turns = [(word + turn * weyl) & 0xFFFFFFFF for turn in range(_ROUNDS)]
        return [np.array(high << 32 | low, np.uint64) for high, low in zip(turns[::2], turns[1::2], strict=True)]

    return pairs(seed & 0xFFFFFFFF, _WEYL_A), pairs(seed >> 32 & 0xFFFFFFFF, _WEYL_B)


def _box_muller(state: np.ndarray, out: np.ndarray) -> None:
    """Normals from `_philox`'s state [2, N, blocks], which it destroys, into out: fp32 [N, 4·blocks]."""
    flat = state.reshape(-1)
    bitwise_and(flat, _CLEAR_SIGN, flat)  # r0 and r2 become whole numbers below 2³¹
    words = flat.view(np.int32)
    radius = words[1::2].astype(np.float32)
    multiply(radius, _UNIT, radius)
    np.add(radius, _HALF_UNIT, radius)  # u in (0, 1]
    np.log(radius, radius)
    multiply(radius, _MINUS_TWO, radius)
    np.sqrt(radius, radius)
    angle = words[::2].astype(np.float32)
    multiply(angle, _RADIANS, angle)
    cosine = np.cos(angle)
    sine = np.sin(angle, angle)
    pairs = out.reshape(-1, 4).T  # [normal of the block, block]
    half = len(radius) // 2
    multiply(radius[:half], cosine[:half], pairs[0])
    multiply(radius[:half], sine[:half], pairs[1])
    multiply(radius[half:], cosine[half:], pairs[2])
    multiply(radius[half:], sine[half:], pairs[3])


def check_ids(ids: torch.Tensor, count: int, name: str = "ids") -> None:
    """Raises UsageError unless `ids` is a contiguous int64 [count]."""
    if ids.dtype != torch.int64 or ids.shape != (count,) or not ids.is_contiguous():
        raise UsageError(f"{name}: expected contiguous int64 [{count}], got {ids.dtype} {list(ids.shape)}")


def check_out(out: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Raises UsageError unless `out` is what the kernel would have allocated."""
    if out.shape != shape or out.dtype != dtype or out.device != device:
        raise UsageError(
            f"out: expected {dtype} {list(shape)} on {device}, got {out.dtype} {list(out.shape)} on {out.device}"
        )


@triton.jit
def _words(seed, c0, c1, id):
    """The four words of the counters (c0, c1, id): uint32."""
    c0 = c0.to(tl.uint32)
    return tl.philox(seed, c0, c0 * 0 + c1.to(tl.uint32), id.to(tl.uint32) + c0 * 0, (id >> 32).to(tl.uint32) + c0 * 0)


@triton.jit
def _pair(r_radius, r_angle):
    """Two normals from two words, by Box-Muller."""
    whole = (r_radius & 0x7FFFFFFF).to(tl.int32, bitcast=True)
    radius = tl.sqrt(-2.0 * tl.log(whole.to(tl.float32) * 4.656612873077393e-10 + 2.3283064365386963e-10))
    angle = r_angle.to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def _normal4(seed, c0, c1, id):
    """The normals 4·c0 .. 4·c0 + 3 of an image, for a vector c0 of N blocks: fp32 [4·N].

    seed: i64; c0: i32 or i64 [N]; c1: stream << 16 | step; id: i64.
    """
    r0, r1, r2, r3 = _words(seed, c0, c1, id)
    z0, z1 = _pair(r0, r1)
    z2, z3 = _pair(r2, r3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


@triton.jit(do_not_specialize=["seed", "counter_word"])
def _normal_kernel(out, ids, seed: tl.int64, counter_word: tl.int64, size, BLOCK: tl.constexpr):
    image = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    blocks = chunk * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    elements = chunk * BLOCK + tl.arange(0, BLOCK)
    noise = _normal4(seed, blocks, counter_word, tl.load(ids + image))
    tl.store(out + image * size + elements, noise, mask=elements < size)


@triton.jit(do_not_specialize=["seed", "counter_word", "first_block"])
def _bits_kernel(out, ids, seed: tl.int64, counter_word: tl.int64, first_block: tl.int64, blocks, BLOCK: tl.constexpr):
    image = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    r0, r1, r2, r3 = _words(seed, first_block + block, counter_word, tl.load(ids + image))
    words = out + (image * blocks + block) * 4
    inside = block < blocks
    tl.store(words, r0.to(tl.int64), mask=inside)
    tl.store(words + 1, r1.to(tl.int64), mask=inside)
    tl.store(words + 2, r2.to(tl.int64), mask=inside)
    tl.store(words + 3, r3.to(tl.int64), mask=inside)

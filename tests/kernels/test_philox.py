"""Philox words against the published vectors and plain integers; normals against float64 Box-Muller."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from streamaug.kernels import philox
from streamaug.kernels.philox import bits, normal, signed64

from streamaug.errors import UsageError

# Random123's known answers for philox4x32-10: counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def plain_philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox4x32-10 as the paper writes it, in Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def box_muller(words: torch.Tensor) -> np.ndarray:
    """Float64 normals from int64 words [..., 4]; u is rounded to fp32, as in the kernels."""
    w = words.cpu().numpy()
    u = (w[..., ::2] & 0x7FFFFFFF).astype(np.float32) * np.float32(2**-31) + np.float32(2**-32)
    angle = w[..., 1::2].astype(np.uint32).view(np.int32).astype(float) * (2 * math.pi / 2**32)
    radius = np.sqrt(-2 * np.log(u.astype(float)))
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    return pairs.reshape(*w.shape[:-2], -1)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_words_are_the_published_known_answers(backend, device, counter, key, expected):
    c0, c1, c2, c3 = counter
    ids = torch.tensor([signed64(c3 << 32 | c2)], device=device)
    seed = key[1] << 32 | key[0]
    words = bits(ids, 1, seed=seed, stream=c1 >> 16, step=c1 & 0xFFFF, first_block=c0, backend=backend)
    assert words[0, 0].tolist() == list(expected)


@pytest.mark.parametrize("seed", [0, 7, -1, 2**63 + 5, 0xDEADBEEF_12345678])
def test_words_equal_plain_integer_philox(backend, device, seed):
    ids = torch.tensor([0, 1, -1, 2**40 + 3, -(2**62)], device=device)
    words = bits(ids, 3, seed=seed, stream=65535, step=9, backend=backend)
    key = seed % 2**32, seed >> 32 & 0xFFFFFFFF
    for row, number in enumerate(ids.tolist()):
        for block in range(3):
            counter = block, 65535 << 16 | 9, number % 2**32, number >> 32 & 0xFFFFFFFF
            assert tuple(words[row, block].tolist()) == plain_philox(counter, key)


@pytest.mark.parametrize("shape", [(1,), (3,), (5,), (1, 8, 8), (3, 7, 5), (2, 33, 17)])
def test_normals_match_float64_box_muller(backend, device, shape):
    ids = torch.tensor([5, 6, 2**33], device=device)
    size = math.prod(shape)
    words = bits(ids, -(-size // 4), seed=3, stream=2, step=1, backend=backend)
    expected = box_muller(words)[:, :size].reshape(3, *shape)
    noise = normal(ids, shape, seed=3, stream=2, step=1, backend=backend).cpu().numpy()
    np.testing.assert_allclose(noise, expected, atol=1e-5, rtol=0)


def test_the_rarest_words_give_finite_normals():
    words = np.array([0, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF], np.uint64)
    state = np.stack([np.repeat(words, 4) << np.uint64(32) | np.tile(words, 4)] * 2)[:, None]
    out = np.empty((1, 64), np.float32)
    philox._box_muller(state, out)
    assert np.isfinite(out).all()
    assert np.abs(out).max() == pytest.approx(math.sqrt(2 * 32 * math.log(2)), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_dtypes_are_the_fp32_normals_rounded(backend, device, dtype):
    ids = torch.arange(3, device=device)
    noise = normal(ids, (3, 5), seed=1, stream=0, dtype=dtype, backend=backend)
    expected = normal(ids, (3, 5), seed=1, stream=0, backend=backend)
    assert noise.dtype == dtype
    torch.testing.assert_close(noise.float(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


@given(
    ids=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=9),
    size=st.integers(1, 40),
    seed=st.integers(0, 2**64 - 1),
    pick=st.randoms(use_true_random=False),
)
def test_an_id_gets_the_same_noise_in_any_batch_and_position(ids, size, seed, pick):
    noise = normal(torch.tensor(ids), (size,), seed=seed, stream=1, step=2)
    chosen = [pick.randrange(len(ids)) for _ in range(5)]
    again = normal(torch.tensor([ids[at] for at in chosen]), (size,), seed=seed, stream=1, step=2)
    assert torch.equal(again, noise[chosen])


def test_chunks_do_not_show_in_the_noise(monkeypatch):
    ids = torch.arange(7)
    whole = normal(ids, (3, 15), seed=1, stream=0)
    for blocks in (1, 5, 12, 30):
        monkeypatch.setattr(philox, "_CHUNK_BLOCKS", blocks)
        assert torch.equal(normal(ids, (3, 15), seed=1, stream=0), whole)


def test_a_larger_image_starts_with_the_noise_of_a_smaller_one(backend, device):
    ids = torch.tensor([11, 12], device=device)
    small = normal(ids, (6,), seed=1, stream=0, backend=backend)
    large = normal(ids, (1500,), seed=1, stream=0, backend=backend)
    torch.testing.assert_close(large[:, :6], small, atol=1e-6, rtol=0)


def test_out_is_filled_whatever_its_layout(backend, device):
    ids = torch.arange(2, device=device)
    expected = normal(ids, (3, 4, 4), seed=1, stream=0, backend=backend)
    out = torch.empty(2, 3, 4, 4, device=device).to(memory_format=torch.channels_last)
    assert normal(ids, (3, 4, 4), seed=1, stream=0, out=out, backend=backend) is out
    assert torch.equal(out, expected)


def test_empty_requests_give_empty_tensors(backend, device):
    ids = torch.arange(2, device=device)
    assert normal(ids[:0], (3, 4), seed=1, stream=0, backend=backend).shape == (0, 3, 4)
    assert normal(ids, (0, 4), seed=1, stream=0, backend=backend).shape == (2, 0, 4)


def test_normals_have_the_moments_of_a_normal():
    z = normal(torch.arange(4000), (256,), seed=5, stream=0).double().flatten()
    n = z.numel()
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / n)
    for limit, share in ((1.0, 0.317311), (3.0, 0.0026998), (4.0, 6.334e-5)):
        assert abs((z.abs() > limit).double().mean() - share) < 5 * math.sqrt(share / n)


def test_ids_steps_streams_seeds_and_elements_are_uncorrelated():
    ids = torch.arange(500)

    def draw(**changes: int) -> torch.Tensor:
        return normal(ids, (256,), **{"seed": 5, "stream": 0, "step": 0, **changes}).double()

    base = draw()
    others = {
        "next id": base.roll(1, 0),
        "next element": base.roll(1, 1),
        "next block": base.roll(4, 1),
        "step": draw(step=1),
        "stream": draw(stream=1),
        "seed": draw(seed=6),
        "high seed": draw(seed=5 + 2**32),
    }
    bound = 5 / math.sqrt(base.numel())
    for name, other in others.items():
        assert abs((base * other).mean()) < bound, name
        assert abs(((base**2 - 1) * (other**2 - 1) / 2).mean()) < bound, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stream": 65536}, "0..65535"),
        ({"step": -1}, "0..65535"),
        ({"ids": torch.arange(3, dtype=torch.int32)}, r"ids: expected contiguous int64"),
        ({"out": torch.empty(3, 4)}, r"out: expected torch.float32 \[3, 5\]"),
    ],
)
def test_wrong_arguments_are_refused(changes, message):
    arguments = {"ids": torch.arange(3), "stream": 0, "step": 0, **changes}
    with pytest.raises(UsageError, match=message):
        normal(arguments.pop("ids"), (5,), seed=1, **arguments)


@pytest.mark.gpu
def test_a_gpu_draws_the_words_and_normals_of_the_cpu():
    ids = torch.tensor([0, 3, -7, 2**45])
    kwargs = {"seed": -9, "stream": 2, "step": 7}
    assert torch.equal(bits(ids.cuda(), 5000, **kwargs).cpu(), bits(ids, 5000, **kwargs))
    torch.testing.assert_close(
        normal(ids.cuda(), (4, 61, 67), **kwargs).cpu(), normal(ids, (4, 61, 67), **kwargs), atol=1e-5, rtol=0
    )

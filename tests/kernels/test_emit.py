"""Emit and finite against a float64 rounding, image by image."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from streamaug.kernels import emit as module
from streamaug.kernels.emit import emit, finite

from streamaug.errors import UsageError

SHAPES = [(1, 8, 8), (3, 5, 7), (1, 1, 1), (2, 31, 37)]


def expected_bytes(decoded):
    """Float64 with the sum and the product rounded to fp32; torch.round is half to even."""
    scaled = ((decoded.float() + 1).double() * 127.5).float().double()
    return scaled.clamp(0, 255).round().to(torch.uint8)


def run(backend, device, decoded, keep):
    out = torch.full(decoded.shape, 77, dtype=torch.uint8, device=device)
    order, count = emit(decoded.to(device), keep.to(device), out, backend=backend)
    assert order.device == count.device == out.device
    assert (order.dtype, count.dtype, count.shape) == (torch.int64, torch.int64, (1,))
    return out.cpu(), order.tolist(), count.item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_kept_finite_images_are_compacted_in_their_order(backend, device, shape, dtype):
    decoded = (torch.randn(5, *shape, generator=torch.Generator().manual_seed(0)) * 0.7).to(dtype)
    decoded[1].flatten()[-1] = torch.nan
    keep = torch.tensor([True, True, False, True, True])
    out, order, count = run(backend, device, decoded, keep)
    assert (order, count) == ([0, 3, 4, -1, -1], 3)
    assert torch.equal(out[:3], expected_bytes(decoded[[0, 3, 4]]))
    assert (out[3:] == 77).all()


@pytest.mark.parametrize("elements", [1, 70, 1000])
def test_the_reference_goes_through_large_batches_a_few_images_at_a_time(monkeypatch, elements):
    monkeypatch.setattr(module, "_ELEMENTS_AT_ONCE", elements)
    decoded = torch.randn(9, 3, 3, 4, generator=torch.Generator().manual_seed(0))
    decoded[4, 0, 0, 0] = -torch.inf
    keep = torch.arange(9) % 3 != 0
    out, order, count = run("torch", "cpu", decoded, keep)
    assert (order[:count], count) == ([1, 2, 5, 7, 8], 5)
    assert torch.equal(out[:5], expected_bytes(decoded[[1, 2, 5, 7, 8]])) and (out[5:] == 77).all()


@pytest.mark.parametrize("keep", [[True] * 3, [False] * 3])
def test_all_and_none_are_emitted(backend, device, keep):
    decoded = torch.rand(3, 1, 4, 4) * 2 - 1
    out, order, count = run(backend, device, decoded, torch.tensor(keep))
    assert (order, count) == (([0, 1, 2], 3) if keep[0] else ([-1, -1, -1], 0))
    assert torch.equal(out, expected_bytes(decoded) if keep[0] else torch.full_like(out, 77))


def test_values_are_clamped_and_halves_round_to_even(backend, device):
    """-1, 1 and beyond; then values whose byte is exactly 0.5, 1.5, 2.5 and 3.5."""
    halves = [value / 127.5 - 1 for value in (0.5, 1.5, 2.5, 3.5)]
    decoded = torch.tensor([-1.0, 1.0, -3.0, 70000.0, *halves, 0.0, 1e-3]).view(1, 1, 2, 5)
    out, _, _ = run(backend, device, decoded, torch.tensor([True]))
    assert torch.equal(out, expected_bytes(decoded))
    assert out.flatten()[:4].tolist() == [0, 255, 0, 255]
    assert out.flatten()[8].item() == 128  # 127.5 is a half


def test_every_byte_survives_the_way_to_a_float_and_back(backend, device):
    byte = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    out, _, _ = run(backend, device, byte.float() / 127.5 - 1, torch.tensor([True]))
    assert torch.equal(out, byte)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_bad_value_rejects_its_image_alone(backend, device, value):
    decoded = torch.zeros(3, 2, 31, 37)
    decoded[1, 1, 30, 36] = value
    assert finite(decoded.to(device), backend=backend).tolist() == [True, False, True]
    _, order, count = run(backend, device, decoded, torch.ones(3, dtype=torch.bool))
    assert (order, count) == ([0, 2, -1], 2)


def test_channels_last_and_sliced_images_are_read_alike(backend, device):
    decoded = torch.rand(2, 3, 5, 4) * 2 - 1
    keep = torch.tensor([False, True])
    expected, *_ = run(backend, device, decoded, keep)
    wide = torch.cat([decoded, decoded], 3)
    for other in (decoded.to(memory_format=torch.channels_last), wide[..., :4]):
        out, order, _ = run(backend, device, other, keep)
        assert order == [1, -1]
        assert torch.equal(out, expected)


@given(keep=st.lists(st.booleans(), min_size=1, max_size=12), bad=st.sets(st.integers(0, 11)))
def test_order_lists_what_was_kept_and_out_holds_it(keep, bad):
    batch = len(keep)
    decoded = torch.rand(batch, 1, 2, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for at in bad:
        if at < batch:
            decoded[at, 0, 1, 2] = torch.inf
    out, order, count = run("torch", "cpu", decoded, torch.tensor(keep))
    passed = [at for at in range(batch) if keep[at] and at not in bad]
    assert count == len(passed)
    assert order == passed + [-1] * (batch - count)
    assert torch.equal(out[:count], expected_bytes(decoded[passed]))


def test_an_empty_batch_emits_nothing(backend, device):
    _, order, count = run(backend, device, torch.zeros(0, 1, 4, 4), torch.zeros(0, dtype=torch.bool))
    assert (order, count) == ([], 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoded": torch.zeros(2, 1, 4, 4, dtype=torch.uint8)}, "decoded: expected float"),
        ({"keep": torch.ones(2)}, r"keep: expected bool \[2\]"),
        ({"out": torch.zeros(2, 1, 4, 5, dtype=torch.uint8)}, "out: expected contiguous uint8"),
    ],
)
def test_wrong_arguments_are_refused(changes, message):
    arguments = {
        "decoded": torch.zeros(2, 1, 4, 4),
        "keep": torch.ones(2, dtype=torch.bool),
        "out": torch.zeros(2, 1, 4, 4, dtype=torch.uint8),
        **changes,
    }
    with pytest.raises(UsageError, match=message):
        emit(**arguments)


@pytest.mark.gpu
def test_emitting_does_not_synchronise_the_device():
    decoded = torch.rand(64, 3, 64, 64, device="cuda") * 2 - 1
    keep = torch.rand(64, device="cuda") < 0.5
    out = torch.zeros(64, 3, 64, 64, dtype=torch.uint8, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        _, count = emit(decoded, keep, out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(out[: count.item()].cpu(), expected_bytes(decoded[keep].cpu()))

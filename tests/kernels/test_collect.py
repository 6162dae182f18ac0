"""Collect against float64 normalisation of the gathered images."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from streamaug.kernels.collect import collect

from streamaug.errors import UsageError

INDEX = [4, 0, 4, 2]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
SHAPES = [(1, 8, 8), (3, 5, 7), (1, 1, 1), (2, 31, 37)]


def make_slots(shape, device="cpu"):
    return torch.randint(0, 256, (5, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(device)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_are_gathered_as_they_are(backend, device, shape, layout):
    slots, index = make_slots(shape, device), torch.tensor(INDEX, device=device)
    batch = collect(slots, index, memory_format=layout, backend=backend)
    assert batch.dtype == torch.uint8
    assert batch.is_contiguous(memory_format=layout)
    assert torch.equal(batch, slots[INDEX])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("normalise", [False, True])
def test_floats_are_scaled_and_normalised(backend, device, dtype, shape, layout, normalise):
    slots, index = make_slots(shape, device), torch.tensor(INDEX, device=device)
    expected = slots[INDEX].cpu().double() / 255
    options = {}
    if normalise:
        options = {"mean": [0.485, 0.456, 0.406][: shape[0]], "std": [0.229, 0.224, 0.225][: shape[0]]}
        mean, std = (torch.tensor(values).double().view(1, -1, 1, 1) for values in options.values())
        expected = (expected - mean) / std
    batch = collect(slots, index, dtype=dtype, memory_format=layout, backend=backend, **options)
    assert batch.dtype == dtype
    assert batch.is_contiguous(memory_format=layout)
    torch.testing.assert_close(batch.cpu().double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_fp32_is_bit_equal_to_dividing_and_normalising_in_torch(backend, device):
    slots = torch.arange(256, dtype=torch.uint8, device=device).view(1, 1, 16, 16)
    batch = collect(
        slots, torch.zeros(1, dtype=torch.int64, device=device), mean=[0.4], std=[0.3], dtype=torch.float32,
        backend=backend,
    )  # fmt: skip
    assert torch.equal(batch.cpu(), (slots.cpu().float() / 255 - torch.tensor(0.4)) / torch.tensor(0.3))


def test_mean_and_std_may_be_tensors(backend, device):
    slots, index = make_slots((2, 3, 3), device), torch.tensor(INDEX, device=device)
    mean, std = [0.4, 0.5], [0.2, 0.3]
    options = {"dtype": torch.float32, "backend": backend}
    from_lists = collect(slots, index, mean=mean, std=std, **options)
    from_tensors = collect(slots, index, mean=torch.tensor(mean), std=torch.tensor(std), **options)
    assert torch.equal(from_lists, from_tensors)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_out_is_filled_in_its_own_layout(backend, device, layout):
    slots, index = make_slots((3, 4, 5), device), torch.tensor(INDEX, device=device)
    out = torch.empty(4, 3, 4, 5, dtype=torch.float16, device=device).to(memory_format=layout)
    assert collect(slots, index, dtype=torch.float16, out=out, backend=backend) is out
    assert torch.equal(out, collect(slots, index, dtype=torch.float16, backend=backend))


@given(index=st.lists(st.integers(0, 4), max_size=9))
def test_any_selection_in_any_order_is_gathered(index):
    slots = make_slots((1, 2, 3))
    assert torch.equal(collect(slots, torch.tensor(index, dtype=torch.int64)), slots[index])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slots": torch.zeros(2, 1, 4, 4)}, "slots: expected contiguous uint8"),
        ({"index": torch.zeros(2, dtype=torch.int32)}, "index: expected contiguous int64"),
        ({"dtype": torch.int32}, "expected torch.uint8 or a float type"),
        ({"mean": [0.5]}, "both or neither"),
        ({"mean": [0.5], "std": [0.5]}, "bytes are not normalised"),
        ({"mean": [0.5] * 3, "std": [0.5] * 3, "dtype": torch.float32}, "expected 1 numbers each"),
    ],
)
def test_wrong_arguments_are_refused(changes, message):
    arguments = {
        "slots": torch.zeros(2, 1, 4, 4, dtype=torch.uint8),
        "index": torch.tensor([1, 0]),
        **changes,
    }
    with pytest.raises(UsageError, match=message):
        collect(**arguments)


@pytest.mark.gpu
def test_a_gpu_collects_the_batch_of_the_cpu():
    slots, index = make_slots((3, 61, 67)), torch.tensor(INDEX)
    options = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "dtype": torch.float32}
    on_gpu = collect(slots.cuda(), index.cuda(), memory_format=torch.channels_last, **options)
    assert torch.equal(on_gpu.cpu(), collect(slots, index, **options))

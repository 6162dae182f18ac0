"""Perturb against a float64 mix of the same rows and the same noise."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from streamaug.kernels import perturb as module
from streamaug.kernels.perturb import perturb
from streamaug.kernels.philox import normal

from streamaug.errors import UsageError

ROW_A = [0, 4, -1, 2, -1]
ROW_B = [-1, 1, 3, 2, -1]


def expected_mix(bank, row_a, row_b, weights, ids, **noise):
    """Float64, image by image, as the docstring says."""
    images = []
    for at, (a, b) in enumerate(zip(row_a.tolist(), row_b.tolist(), strict=True)):
        image = torch.zeros(bank.shape[1:], dtype=torch.float64)
        if a >= 0:
            image += weights[at, 0].double() * bank[a].double()
        if b >= 0:
            image += weights[at, 1].double() * bank[b].double()
        if weights[at, 2] != 0:
            image += weights[at, 2].double() * normal(ids[at : at + 1], bank.shape[1:], **noise)[0].double()
        images.append(image)
    return torch.stack(images)


def run(backend, device, bank, row_a, row_b, weights, ids, **options):
    moved = (tensor.to(device) for tensor in (bank, row_a, row_b, weights, ids))
    return perturb(*moved, backend=backend, **options).cpu()


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7), (1,), (1201,)])
def test_rows_and_noise_are_mixed_by_their_weights(backend, device, storage, shape):
    bank = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0)).to(storage)
    weights = torch.rand(5, 3, generator=torch.Generator().manual_seed(1))
    weights[3, 2] = 0
    arguments = bank, torch.tensor(ROW_A), torch.tensor(ROW_B), weights, torch.arange(5) - 2
    mixed = run(backend, device, *arguments, seed=3, stream=4)
    expected = expected_mix(*arguments, seed=3, stream=4)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed.double(), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_result_is_cast_once_at_the_end(backend, device, dtype):
    bank = torch.randn(5, 33).half()
    arguments = bank, torch.tensor(ROW_A), torch.tensor(ROW_B), torch.rand(5, 3), torch.arange(5)
    mixed = run(backend, device, *arguments, seed=3, dtype=dtype)
    expected = run(backend, device, *arguments, seed=3)
    assert mixed.dtype == dtype
    torch.testing.assert_close(mixed.float(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_the_weight_of_no_row_is_ignored_and_no_row_is_read_for_it(backend, device):
    bank = torch.full((5, 6), float("nan"))
    bank[2] = 1.0
    row_a, row_b = torch.tensor([2, -1, -1]), torch.tensor([-1, 2, -1])
    weights = torch.tensor([[0.5, torch.nan, 0.0], [torch.inf, 0.25, 0.0], [torch.nan, torch.nan, 0.0]])
    mixed = run(backend, device, bank, row_a, row_b, weights, torch.arange(3), seed=1)
    assert mixed[:, 0].tolist() == [0.5, 0.25, 0.0]


@pytest.mark.parametrize("column", [0, 1, 2])
def test_equal_weights_and_different_weights_agree(backend, device, column):
    """A column of equal weights takes the scalar path of the reference."""
    bank = torch.randn(5, 40)
    rows = torch.arange(5), torch.arange(5).flip(0)
    weights = torch.rand(5, 3)
    weights[:, column] = 0.375
    arguments = bank, *rows, weights, torch.arange(5)
    mixed = run(backend, device, *arguments, seed=1)
    torch.testing.assert_close(mixed.double(), expected_mix(*arguments, seed=1, stream=0), atol=2e-5, rtol=0)


def test_without_noise_weight_no_noise_is_drawn(monkeypatch):
    monkeypatch.setattr(module, "normal", None)
    bank = torch.randn(4, 6)
    weights = torch.tensor([[0.5, 0.5, 0.0]] * 2)
    mixed = perturb(bank, torch.tensor([0, 1]), torch.tensor([2, 3]), weights, torch.arange(2), seed=1, backend="torch")
    torch.testing.assert_close(mixed, (bank[:2] + bank[2:]) / 2)


def test_pure_noise_is_the_normal_of_the_id(backend, device):
    ids = torch.tensor([9, 4])
    none = torch.tensor([-1, -1])
    weights = torch.tensor([[0.0, 0.0, 1.0]] * 2)
    mixed = run(backend, device, torch.randn(3, 2, 5), none, none, weights, ids, seed=7, stream=3)
    torch.testing.assert_close(mixed, normal(ids, (2, 5), seed=7, stream=3), atol=1e-5, rtol=0)


def test_a_bank_without_rows_gives_pure_noise(backend, device):
    none, ids, weights = torch.full((3,), -1), torch.arange(3), torch.tensor([[1.0, 1.0, 0.5]]).repeat(3, 1)
    found = run(backend, device, torch.empty(0, 6), none, none, weights, ids, seed=4)
    torch.testing.assert_close(found, 0.5 * normal(ids, (6,), seed=4, stream=0, backend="torch"))


@given(data=st.data(), count=st.integers(1, 8))
def test_an_image_does_not_depend_on_its_batch(data, count):
    row = st.integers(-1, 3)
    row_a = torch.tensor(data.draw(st.lists(row, min_size=count, max_size=count)))
    row_b = torch.tensor(data.draw(st.lists(row, min_size=count, max_size=count)))
    weight = st.floats(-2, 2, width=32)
    weights = torch.tensor(data.draw(st.lists(st.tuples(weight, weight, weight), min_size=count, max_size=count)))
    ids = torch.arange(count) * 1000
    bank = torch.randn(4, 12, generator=torch.Generator().manual_seed(0)).half()
    together = perturb(bank, row_a, row_b, weights, ids, seed=1)
    for at in range(count):
        one = slice(at, at + 1)
        alone = perturb(bank, row_a[one], row_b[one], weights[one], ids[one], seed=1)
        torch.testing.assert_close(alone[0], together[at], atol=1e-6, rtol=1e-6)


def test_chunks_do_not_show_in_the_result(monkeypatch):
    bank = torch.randn(5, 30).half()
    arguments = bank, torch.tensor(ROW_A), torch.tensor(ROW_B), torch.rand(5, 3), torch.arange(5)
    whole = perturb(*arguments, seed=1)
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 60)
    assert torch.equal(perturb(*arguments, seed=1), whole)


def test_out_is_filled(backend, device):
    bank = torch.randn(5, 9, device=device)
    rows = torch.tensor([1, 2], device=device)
    weights, ids = torch.rand(2, 3, device=device), torch.arange(2, device=device)
    out = torch.empty(2, 9, dtype=torch.float16, device=device)
    assert perturb(bank, rows, rows, weights, ids, seed=1, dtype=torch.float16, out=out, backend=backend) is out
    torch.testing.assert_close(
        out.float(), perturb(bank, rows, rows, weights, ids, seed=1, backend=backend), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bank": torch.zeros(4, 6, dtype=torch.int32)}, "bank: expected"),
        ({"row_a": torch.tensor([0, 4])}, r"bank has rows 0\.\.3"),
        ({"row_b": torch.tensor([-2, 0])}, r"bank has rows 0\.\.3"),
        ({"weights": torch.rand(2, 2)}, r"weights: expected contiguous fp32 \[2, 3\]"),
        ({"ids": torch.arange(3)}, r"ids: expected contiguous int64 \[2\]"),
    ],
)
def test_wrong_arguments_are_refused(changes, message):
    arguments = {
        "bank": torch.rand(4, 6),
        "row_a": torch.tensor([0, 1]),
        "row_b": torch.tensor([-1, 1]),
        "weights": torch.rand(2, 3),
        "ids": torch.arange(2),
        **changes,
    }
    with pytest.raises(UsageError, match=message):
        perturb(**arguments, seed=1)


@pytest.mark.gpu
def test_a_bank_of_more_than_two_billion_elements_is_read_at_the_right_place():
    bank = torch.zeros(70_000, 32_768, dtype=torch.float16, device="cuda")
    bank[69_999] = 3.0
    rows = torch.tensor([69_999], device="cuda")
    weights = torch.tensor([[1.0, 0.0, 0.0]], device="cuda")
    ids = torch.zeros(1, dtype=torch.int64, device="cuda")
    assert perturb(bank, rows, rows - 1, weights, ids, seed=1).eq(3.0).all()

"""The table of neighbours: right whatever is measured at once, and safe in a cache that others write to."""

from pathlib import Path

import numpy as np
import pytest
import torch

from streamaug.bank import BankPlan, BankWriter, LatentBank, Part, neighbours
from streamaug.bank.neighbours import nearest_rows
from streamaug.errors import BankError

ROWS = 600


@pytest.fixture(scope="module")
def bank(tmp_path_factory) -> LatentBank:
    rng = np.random.default_rng(0)
    labels = rng.choice(3, ROWS, p=[0.55, 0.44, 0.01])
    labels[labels == 2] = 0
    labels[7] = 2  # alone
    hashes = [f"{row:064x}" for row in range(ROWS)]
    meta = {"model": "m", "image_shape": [1, 8, 8]}
    names = [str(row) for row in range(ROWS)]
    plan = BankPlan(labels, hashes, names, ["a", "b", "c"], meta, [Part("encode", {})], shard_rows=128)
    latents = torch.from_numpy(rng.standard_normal((ROWS, 2, 3, 3)))
    with BankWriter(tmp_path_factory.mktemp("bank") / "bank", plan) as writer:
        for group in writer.pending("encode"):
            writer.put("encode", group, {"latent": latents[group.rows]})
        return writer.finish()


def assert_nearest(bank: LatentBank, table: np.ndarray, count: int) -> None:
    """Rows whose distances differ by less than fp32 tells may stand in either order."""
    values = bank.tensor("latent").double().flatten(1).numpy()
    assert table.shape == (ROWS, count)
    for row, found in enumerate(table):
        others = np.flatnonzero((bank.labels == bank.labels[row]) & (np.arange(ROWS) != row))
        near = found[: len(others)]
        assert (found[len(others) :] == -1).all() and len(set(near)) == len(near) and set(near) <= set(others)
        least = np.sort(np.linalg.norm(values[others] - values[row], axis=1))[:count]
        np.testing.assert_allclose(np.linalg.norm(values[near] - values[row], axis=1), least, atol=2e-5, rtol=0)


@pytest.mark.parametrize("block_bytes", [1 << 28, 1], ids=["a class at once", "in blocks"])
def test_the_nearest_rows_of_the_class_come_first_and_a_row_is_not_its_own_neighbour(
    bank, tmp_path, monkeypatch, block_bytes
):
    monkeypatch.setattr(neighbours, "_BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(neighbours, "_CHUNK", 100)
    assert_nearest(bank, nearest_rows(bank, 5, tmp_path), 5)


def test_the_table_is_kept_and_another_process_that_writes_to_the_cache_does_not_matter(bank, tmp_path, monkeypatch):
    (tmp_path / "writing").mkdir()  # where a temporary file of a fixed name would go
    first = nearest_rows(bank, 2, tmp_path)
    monkeypatch.setattr(neighbours, "_measure", None)
    np.testing.assert_array_equal(nearest_rows(bank, 2, tmp_path), first)
    assert sorted(file.suffix for file in tmp_path.iterdir()) == ["", ".safetensors"]


def test_a_bank_without_tensors_has_no_neighbours(tmp_path):
    plan = BankPlan(np.zeros(1, np.int64), ["0" * 64], ["a"], ["c"], {"model": "m", "image_shape": [1, 8, 8]}, [])
    with BankWriter(tmp_path / "bank", plan) as writer:
        empty = writer.finish()
    with pytest.raises(BankError, match="no tensors to measure a distance by"):
        nearest_rows(empty, 1, Path(tmp_path))

"""Reading: what was written is what is read, whole or by rows."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamaug.bank import LatentBank
from streamaug.data.perceptual import HASH_DTYPE, perceptual_hash
from streamaug.errors import BankError

from .banks import ARRAYS, CLASSES, ROWS, TENSORS, compute, contents, make_plan, write

some_rows = st.lists(st.integers(0, ROWS - 1), max_size=40)


def test_a_bank_gives_back_what_was_put_into_it(expected):
    plan, _, bank = expected
    encode, embedding = (compute(plan, part, np.arange(ROWS)) for part in ("encode", "embedding"))
    assert bank.num_rows == len(bank) == ROWS
    assert torch.equal(bank.tensor("latent"), encode["latent"].half())
    assert torch.equal(bank.tensor("tokens"), embedding["tokens"].bfloat16())
    assert torch.equal(bank.tensor("code"), encode["code"]) and bank.tensor("code").dtype == torch.int64
    assert bank.labels.tolist() == plan.labels.tolist() and bank.labels.dtype == np.int64
    assert bank.class_names == CLASSES and bank.meta == plan.meta and bank.image_shape == (1, 4, 4)
    assert bank.source_hashes == plan.source_hashes and bank.source_names == plan.source_names
    assert bank.edits == [] and bank.perceptual_hashes is None


def test_each_part_has_its_settings_and_tensors(expected):
    bank = expected[2]
    assert bank.parts == {"encode": {"model": "m1"}, "embedding": {"model": "m1", "lr": 0.1}}
    assert sorted(bank.tensors_of("encode")) == ["code", "latent"] and bank.tensors_of("embedding") == ["tokens"]
    assert bank.tensors_of("ddim") == []
    assert sorted(bank.tensor_names) == sorted(TENSORS) and sorted(bank.row_arrays) == sorted(ARRAYS)


def test_one_value_a_row_is_kept_in_float32_whatever_the_part_stores(expected):
    plan, _, bank = expected
    losses = bank.row_array("embedding.loss")
    assert losses.dtype == np.float32 and losses.shape == (ROWS,)
    assert (losses == compute(plan, "embedding", np.arange(ROWS))["embedding.loss"].numpy()).all()


def test_the_files_of_a_bank_are_an_index_rows_and_the_shards_of_each_part(expected):
    names = [name.split("-")[0] for name in expected[1]]
    assert names == [".bank", *["embedding"] * 5, *["encode"] * 4, "index.json", "rows"]


@settings(deadline=None, max_examples=60)
@given(rows=some_rows)
def test_gather_equals_indexing_all_rows(expected, rows):
    bank = expected[2]
    for name in (*bank.tensor_names, *bank.row_arrays):
        assert torch.equal(bank.gather(name, rows), bank.tensor(name)[rows])
        assert torch.equal(bank.gather(name, torch.tensor(rows, dtype=torch.int64)), bank.tensor(name)[rows])


@settings(deadline=None, max_examples=60)
@given(rows=some_rows)
def test_the_mean_of_a_group_is_that_of_the_rows_computed_together(expected, rows):
    bank = expected[2]
    means = bank.group_mean("tokens", rows)
    assert means.dtype == torch.float32 and means.shape == (len(rows), 2, 4)
    everything = bank.tensor("tokens").double()
    for row, mean in zip(rows, means, strict=True):
        start = row // 5 * 5
        assert torch.equal(mean, everything[start : start + 5].mean(0).float())


def test_the_mean_is_over_all_rows_and_all_shards(expected):
    bank = expected[2]
    assert torch.allclose(bank.mean("latent"), bank.tensor("latent").float().mean(0), atol=1e-6)
    assert bank.mean("latent") is bank.mean("latent")


@settings(deadline=None, max_examples=40)
@given(rows=some_rows)
def test_rows_are_found_by_hash_and_by_name(expected, rows):
    bank = expected[2]
    hashes = [bank.source_hashes[row] for row in rows] + [hashlib.sha256(b"not in it").hexdigest()]
    names = [bank.source_names[row] for row in rows] + ["images/nowhere.png"]
    assert bank.rows_with(hashes).tolist() == sorted(set(rows)) == bank.rows_named(names).tolist()


@pytest.mark.parametrize("rows", [[-1], [0, ROWS]])
def test_a_row_outside_the_bank_is_refused(expected, rows):
    for ask in (expected[2].gather, expected[2].group_mean):
        with pytest.raises(BankError, match=r"the bank has 0 to 22"):
            ask("latent", rows)


def test_an_unknown_tensor_or_row_array_is_refused_with_those_there_are(expected):
    with pytest.raises(BankError, match=r"no tensor 'pooled'; this bank has .*latent.*tokens"):
        expected[2].gather("pooled", [0])
    with pytest.raises(BankError, match=r"no row array 'latent'; this bank has encode.score, embedding.loss"):
        expected[2].row_array("latent")


def test_one_shard_is_mapped_and_writing_to_the_tensor_does_not_reach_the_file(tmp_path):
    bank = write(tmp_path / "bank", make_plan(shard_rows=100))
    before = contents(bank.path)
    assert bank.tensor("latent").data_ptr() == bank.tensor("latent").data_ptr()
    bank.tensor("latent").zero_()
    assert contents(bank.path) == before
    assert LatentBank.open(bank.path).tensor("latent").any()


def test_a_bank_without_inversion_needs_no_rows(tmp_path):
    plan = make_plan(rows=0, parts=[], perceptual_hashes=perceptual_hash(np.empty((0, 3, 8, 8), np.uint8)))
    bank = write(tmp_path / "bank", plan)
    assert len(bank) == 0 and bank.parts == {} and bank.tensor_names == bank.row_arrays == []
    assert bank.class_names == CLASSES and bank.rows_with(["00" * 32]).tolist() == []


def test_perceptual_hashes_are_kept(tmp_path):
    hashes = np.frombuffer(np.random.default_rng(0).bytes(32 * ROWS), HASH_DTYPE)
    bank = write(tmp_path / "bank", make_plan(perceptual_hashes=hashes))
    assert bank.perceptual_hashes.dtype == HASH_DTYPE and (bank.perceptual_hashes == hashes).all()

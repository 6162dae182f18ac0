"""Merging and dropping: what is left is what was, whatever was taken away or put together."""

import os
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamaug.bank import BankWriter, LatentBank, files
from streamaug.bank.edit import drop, merge
from streamaug.bank.verify import verify
from streamaug.data.perceptual import HASH_DTYPE
from streamaug.errors import BankError, MismatchError, UsageError

from .banks import ARRAYS, CLASSES, EMBEDDING, ENCODE, ROWS, TENSORS, contents, make_nan, make_plan, plan_of, write
from .banks import shard_of as shard

subsets = st.sets(st.integers(0, ROWS - 1), min_size=1, max_size=ROWS - 1).map(sorted)


def list_of(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def same_rows(bank: LatentBank, rows: list[int], whole: LatentBank) -> None:
    """Assert that the bank's rows are these rows of another."""
    assert bank.num_rows == len(rows) and verify(bank.path).problems == []
    assert bank.labels.tolist() == whole.labels[rows].tolist()
    assert bank.source_hashes == [whole.source_hash(row) for row in rows]
    assert bank.source_names == [whole.source_name(row) for row in rows]
    for name in TENSORS + ARRAYS:
        assert torch.equal(bank.tensor(name), whole.gather(name, rows)), name


# ---- drop


@settings(deadline=None, max_examples=12)
@given(dropped=subsets)
def test_the_rows_left_after_a_drop_are_what_they_were(expected, tmp_path_factory, dropped):
    _, before, whole = expected
    path = tmp_path_factory.mktemp("drop")
    hashes = list_of(path / "hashes.txt", [whole.source_hash(row) for row in dropped])
    report = drop(whole.path, path / "out", hashes=hashes)
    left = [row for row in range(ROWS) if row not in dropped]
    assert report.rows == len(dropped) and report.left == len(left) and report.unmatched == 0
    bank = LatentBank.open(path / "out")
    same_rows(bank, left, whole)
    assert contents(whole.path) == before
    shutil.copytree(whole.path, path / "in-place")
    drop(path / "in-place", hashes=hashes)
    assert contents(path / "in-place") == contents(path / "out")
    for at, row in enumerate(left):  # the group it was computed in, as far as it is left
        group = [other for other, source in enumerate(left) if source // 5 == row // 5]
        assert torch.equal(bank.group_mean("tokens", [at])[0], bank.tensor("tokens")[group].double().mean(0).float())


@settings(deadline=None, max_examples=6)
@given(first=subsets, second=subsets)
def test_dropping_twice_is_dropping_once(expected, tmp_path_factory, first, second):
    whole = expected[2]
    left = [row for row in range(ROWS) if row not in {*first, *second}]
    if not left or not set(second) - set(first):
        return
    path = tmp_path_factory.mktemp("twice")
    drop(whole.path, path / "bank", hashes=list_of(path / "a", [whole.source_name(row) for row in first]))
    drop(path / "bank", hashes=list_of(path / "b", [whole.source_name(row) for row in second]))
    same_rows(LatentBank.open(path / "bank"), left, whole)


def test_a_class_is_dropped_by_name_and_counted(copy):
    report = drop(copy, classes=["dog"])
    assert report.by_class == {"dog": 8} and report.left == 15
    bank = LatentBank.open(copy)
    assert set(bank.labels.tolist()) == {0, 2} and bank.class_names == CLASSES
    assert bank.edits == ["8 of 23 rows dropped"]


@pytest.mark.parametrize(("operator", "compare"), [(">", np.greater), ("<=", np.less_equal)])
def test_rows_are_dropped_by_quality(expected, tmp_path, operator, compare):
    whole = expected[2]
    losses = whole.row_array("embedding.loss")
    limit = float(np.median(losses))
    drop(whole.path, tmp_path / "out", quality=f"embedding.loss {operator} {limit!r}")
    same_rows(LatentBank.open(tmp_path / "out"), np.flatnonzero(~compare(losses, limit)).tolist(), whole)


def test_lines_that_name_nothing_are_counted(expected, tmp_path):
    listed = list_of(tmp_path / "list", ["images/3.png", "", "images/nowhere.png", "0" * 64, "images/3.png"])
    report = drop(expected[2].path, tmp_path / "out", hashes=listed)
    assert report.rows == 1 and report.unmatched == 2


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"classes": ["dgo"]}, r"no class 'dgo' \(did you mean 'dog'\?\); its classes: cat, dog, emu"),
        ({"classes": CLASSES}, r"all 23 rows would be dropped"),
        ({"quality": "ddim.error>0.1"}, r"no row array 'ddim.error'; this bank has encode.score, embedding.loss"),
        ({"quality": "encode.score"}, r"expected a row array, one of < <= > >= and a number"),
        ({"quality": "encode.score>high"}, r"quality 'encode.score>high': expected"),
        ({"hashes": ["images/nowhere.png"]}, r"none of the 1 lines of .*list is a source hash .*such as images/0.png"),
        ({}, r"give --class, --hashes or --quality"),
    ],
)
@pytest.mark.parametrize("in_place", [False, True])
def test_a_drop_that_cannot_be_meant_is_refused_and_changes_nothing(copy, tmp_path, conditions, message, in_place):
    before = contents(copy)
    if "hashes" in conditions:
        conditions = {"hashes": list_of(tmp_path / "list", conditions["hashes"])}
    with pytest.raises(UsageError, match=message):
        drop(copy, None if in_place else tmp_path / "out", **conditions)
    assert contents(copy) == before and not (tmp_path / "out").exists()


def test_dropping_no_row_in_place_changes_nothing(copy):
    before = contents(copy)
    assert drop(copy, quality="embedding.loss>1e9").rows == 0
    assert contents(copy) == before


def test_shards_that_lose_no_row_are_left_alone(copy):
    before = {file.name: file.stat().st_ino for file in copy.glob("e*-*")}
    drop(copy, hashes=list_of(copy.parent / "list", ["images/0.png"]))
    after = {file.name: file.stat().st_ino for file in copy.glob("e*-*")}
    changed = {name for name in before if before[name] != after.get(name)}
    assert {name.rsplit("-", 1)[0] for name in changed} == {"encode-00000", "embedding-00000"}
    assert len(after) == len(before)


def test_a_drop_in_place_that_crashes_leaves_the_old_bank_or_the_new_one(expected, copy, tmp_path, monkeypatch):
    class Crash(BaseException):
        pass

    whole = expected[2]
    listed = list_of(tmp_path / "list", ["images/0.png", "images/22.png"])
    drop(whole.path, tmp_path / "done", hashes=listed)
    wanted = LatentBank.open(tmp_path / "done").digest
    outcomes = []
    for moment in range(100):
        path = shutil.copytree(copy, tmp_path / str(moment))
        left = moment

        def crashing(operation):
            def call(*args, **kwargs):
                nonlocal left
                left -= 1
                if left < 0:
                    raise Crash
                return operation(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in ("fsync", "replace", "unlink", "rmdir"):
                patch.setattr(os, name, crashing(getattr(os, name)))
            with suppress(Crash):
                drop(path, hashes=listed)
                break
        assert verify(path).problems == []
        outcomes.append(LatentBank.open(path).digest)
        if outcomes[-1] != wanted:
            drop(path, hashes=listed)
        assert LatentBank.open(path).digest == wanted
    assert set(outcomes) == {whole.digest, wanted} and len(outcomes) > 15
    assert outcomes == sorted(outcomes, key=lambda digest: digest == wanted)


def test_a_bank_that_is_written_is_not_dropped_from(expected, copy):
    with BankWriter(copy, expected[0]), pytest.raises(BankError, match=r"another process is writing this bank"):
        drop(copy, classes=["dog"])
    assert LatentBank.open(copy).digest == expected[2].digest


def test_an_occupied_folder_is_refused(expected, copy, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.png").write_bytes(b"precious")
    with pytest.raises(BankError, match=r"a bank is there already; choose a new folder"):
        drop(expected[2].path, copy, classes=["dog"])
    with pytest.raises(BankError, match=r"not a bank's \(holiday.png\)"):
        merge([expected[2].path, copy], tmp_path / "photos")


def test_inverting_again_after_a_drop_computes_only_the_groups_that_lost_rows(expected, copy):
    drop(copy, hashes=list_of(copy.parent / "list", ["images/0.png"]))
    computed: list[str] = []
    write(copy, expected[0], computed)
    assert computed == ["encode 0", "embedding 0"] and contents(copy) == expected[1]


def test_a_damaged_shard_is_not_carried_along(expected, copy, tmp_path):
    make_nan(shard(copy, 1), "latent", 0, 36)
    with pytest.raises(BankError, match=r"encode-00001.*bytes are not those.*verify .* --repair"):
        drop(copy, tmp_path / "out", classes=["dog"])


# ---- merge


@settings(deadline=None, max_examples=8)
@given(part=subsets)
def test_the_merge_of_a_split_is_the_whole(expected, tmp_path_factory, part):
    whole = expected[2]
    path = tmp_path_factory.mktemp("split")
    rest = [row for row in range(ROWS) if row not in part]
    for name, rows in (("a", rest), ("b", part)):
        drop(whole.path, path / name, hashes=list_of(path / f"{name}.txt", [whole.source_hash(row) for row in rows]))
    merged = merge([path / "a", path / "b"], path / "both")
    assert merged.rows == ROWS and merged.duplicates == 0
    bank = LatentBank.open(path / "both")
    same_rows(bank, part + rest, whole)
    groups = [(half, row // 5) for half, rows in enumerate((part, rest)) for row in rows]
    for at, group in enumerate(groups):
        members = [other for other, its in enumerate(groups) if its == group]
        assert torch.equal(bank.group_mean("tokens", [at])[0], bank.tensor("tokens")[members].double().mean(0).float())


def test_duplicates_are_kept_once_and_counted(expected, tmp_path):
    whole = expected[2]
    other = write(tmp_path / "other", plan_of([*map(str, range(10, 23)), "new", "newer"], labels=np.arange(10, 25) % 3))
    merged = merge([whole.path, other.path], tmp_path / "both")
    assert merged.rows == ROWS + 2 and merged.duplicates == 13
    bank = LatentBank.open(tmp_path / "both")
    assert bank.source_hashes == whole.source_hashes + other.source_hashes[13:]
    assert torch.equal(bank.gather("latent", [23, 24]), other.gather("latent", [13, 14]))
    assert bank.edits == ["merged from 2 banks, 13 duplicate rows left out"]
    assert merge([whole.path, bank.path, other.path], tmp_path / "all").rows == ROWS + 2


def test_the_same_pixels_in_another_class_are_no_duplicate(expected, tmp_path):
    other = write(tmp_path / "other", make_plan(labels=(np.arange(ROWS) + 1) % 3))
    assert merge([expected[2].path, other.path], tmp_path / "both").rows == 2 * ROWS


def test_classes_in_another_order_are_matched_by_name(expected, tmp_path):
    other = write(tmp_path / "other", plan_of(["x", "y", "z"], class_names=["emu", "cat", "dog"]))
    merge([expected[2].path, other.path], tmp_path / "both")
    bank = LatentBank.open(tmp_path / "both")
    assert bank.class_names == CLASSES and bank.labels[-3:].tolist() == [2, 0, 1]


def test_merged_banks_are_merged_and_dropped_from_like_others(expected, tmp_path):
    other = write(tmp_path / "other", plan_of(["x", "y", "z"]))
    merge([expected[2].path, other.path], tmp_path / "both")
    drop(tmp_path / "both", classes=["cat"])
    bank = LatentBank.open(tmp_path / "both")
    assert bank.num_rows == 17 and verify(bank.path).problems == [] and len(bank.edits) == 2
    assert merge([bank.path, other.path], tmp_path / "again").duplicates == 2


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"meta": {"model": "m2", "image_shape": [1, 4, 4]}},
            r"other cannot be merged with .*: meta.model is 'm2' there and 'm1' here",
        ),
        ({"meta": {"model": "m1", "image_shape": [1, 8, 2]}}, r"meta.image_shape is \[1, 8, 2\] there and \[1, 4, 4\]"),
        ({"parts": [ENCODE]}, r"the list of methods is 'encode' there and 'encode, embedding' here"),
        (
            {"parts": [ENCODE, replace(EMBEDDING, meta={"model": "m1", "lr": 0.2})]},
            r"embedding.meta.lr is 0.2 there and 0.1 here",
        ),
        ({"parts": [replace(ENCODE, dtype="float32"), EMBEDDING]}, r"encode.dtype is 'float32' there and 'float16'"),
        ({"class_names": ["cat", "dog", "fox"]}, r"set of classes is 'cat, dog, fox' there and 'cat, dog, emu' here"),
    ],
)
def test_banks_of_different_making_are_not_merged(expected, tmp_path, other, message):
    write(tmp_path / "other", make_plan(**other))
    with pytest.raises(MismatchError, match=message):
        merge([expected[2].path, tmp_path / "other"], tmp_path / "both")
    assert not (tmp_path / "both").exists()


def test_one_bank_is_no_merge(expected, tmp_path):
    with pytest.raises(UsageError, match=r"two banks or more"):
        merge([expected[2].path], tmp_path / "both")


def test_an_interrupted_merge_is_said_to_be_unfinished_and_goes_through_again(expected, copy, tmp_path):
    out = tmp_path / "both"
    (out / files.WORK).mkdir(parents=True)
    (out / files.WORK / "writing").write_bytes(b"half of a fi")
    with pytest.raises(BankError, match=r"an unfinished bank: .*or the `streamaug bank` verb that was writing it"):
        LatentBank.open(out)
    merge([expected[2].path, copy], out)
    same_rows(LatentBank.open(out), list(range(ROWS)), expected[2])
    assert not (out / files.WORK).exists()


def test_perceptual_hashes_outlive_drop_and_merge_where_all_banks_have_them(expected, tmp_path):
    hashes = np.random.default_rng(0).bytes(32 * ROWS)
    hashes = np.frombuffer(hashes, HASH_DTYPE)
    one = write(tmp_path / "one", make_plan(perceptual_hashes=hashes))
    drop(one.path, tmp_path / "dropped", classes=["cat"])
    assert (LatentBank.open(tmp_path / "dropped").perceptual_hashes == hashes[np.arange(ROWS) % 3 != 0]).all()
    merge([tmp_path / "dropped", one.path], tmp_path / "both")
    assert len(LatentBank.open(tmp_path / "both").perceptual_hashes) == ROWS
    merge([one.path, expected[2].path], tmp_path / "mixed")
    assert LatentBank.open(tmp_path / "mixed").perceptual_hashes is None

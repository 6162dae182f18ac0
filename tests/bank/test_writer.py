"""Writing: a group is computed once, what changed is redone and nothing else, one process writes at a time."""

import errno
import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamaug.bank import BankWriter, Checkpoint, LatentBank, Part, open_if_current
from streamaug.bank.verify import verify
from streamaug.errors import BankError

from .banks import EMBEDDING, ENCODE, ROWS, compute, contents, make_plan, write, write_pending

ENCODE_GROUPS = [f"encode {number}" for number in range(8)]
EMBEDDING_GROUPS = [f"embedding {number}" for number in range(5)]


def test_groups_have_one_shape_and_the_last_is_padded():
    groups = make_plan().groups("encode")
    assert [len(group.padded) for group in groups] == [3] * 8
    assert groups[-1].rows.tolist() == [21, 22] and groups[-1].padded.tolist() == [21, 22, 22]


def test_a_finished_group_is_never_computed_again(expected, tmp_path):
    plan, uninterrupted, _ = expected
    with BankWriter(tmp_path / "bank", plan) as writer:
        for group in list(writer.pending("encode"))[2:5]:
            writer.put("encode", group, compute(plan, "encode", group.padded))
        assert writer.done_rows("encode") == 9 and writer.done_rows("embedding") == 0
    computed: list[str] = []
    write(tmp_path / "bank", plan, computed)
    assert computed == [ENCODE_GROUPS[number] for number in (0, 1, 5, 6, 7)] + EMBEDDING_GROUPS
    assert contents(tmp_path / "bank") == uninterrupted


def test_an_unfinished_bank_cannot_be_opened_or_finished(tmp_path):
    plan = make_plan()
    with BankWriter(tmp_path / "bank", plan) as writer:
        writer.put("encode", next(writer.pending("encode")), compute(plan, "encode", np.arange(3)))
        with pytest.raises(BankError, match=r"7 of 8 groups of 'encode' are not computed yet"):
            writer.finish()
    with pytest.raises(BankError, match=r"unfinished bank: run `streamaug invert` again"):
        LatentBank.open(tmp_path / "bank")


# ---- checkpoints


def test_a_checkpoint_is_there_after_a_kill_and_gone_after_the_group_is_put(tmp_path):
    plan = make_plan()
    with BankWriter(tmp_path / "bank", plan) as writer:
        group = next(writer.pending("embedding"))
        assert writer.checkpoint("embedding", group).load() is None
        writer.checkpoint("embedding", group).save({"x": torch.arange(6).reshape(2, 3).T, "step": torch.tensor(7)})
    with BankWriter(tmp_path / "bank", plan) as writer:
        saved = writer.checkpoint("embedding", group).load()
        assert saved["x"].tolist() == [[0, 3], [1, 4], [2, 5]] and saved["step"] == 7
        writer.put("embedding", group, compute(plan, "embedding", group.padded))
        assert writer.checkpoint("embedding", group).load() is None


def test_a_checkpoint_of_other_images_or_settings_is_not_loaded(tmp_path):
    others = [make_plan({2: "new"}), make_plan(parts=[ENCODE, replace(EMBEDDING, meta={"lr": 0.2})])]
    with BankWriter(tmp_path / "bank", make_plan()) as writer:
        writer.checkpoint("embedding", next(writer.pending("embedding"))).save({"x": torch.zeros(1)})
    for plan in others:
        with BankWriter(tmp_path / "bank", plan) as writer:
            assert writer.checkpoint("embedding", next(writer.pending("embedding"))).load() is None


def test_a_damaged_checkpoint_is_none(tmp_path):
    checkpoint = Checkpoint(tmp_path / "x.safetensors")
    checkpoint.save({"x": torch.zeros(100)})
    os.truncate(tmp_path / "x.safetensors", 50)
    assert checkpoint.load() is None


def test_a_checkpoint_of_nowhere_keeps_nothing():
    Checkpoint(None).save({"x": torch.zeros(1)})
    assert Checkpoint(None).load() is None
    Checkpoint(None).remove()


# ---- change


@settings(deadline=None, max_examples=6)
@given(changed=st.sets(st.integers(0, ROWS - 1), min_size=1, max_size=4))
def test_changed_images_redo_their_groups_only_and_leave_no_trace_of_history(expected, tmp_path_factory, changed):
    path = tmp_path_factory.mktemp("changed")
    shutil.copytree(expected[2].path, path / "old")
    plan = make_plan({row: f"changed {row}" for row in changed})
    computed: list[str] = []
    write(path / "old", plan, computed)
    write(path / "new", plan)
    assert computed == [f"encode {group}" for group in sorted({row // 3 for row in changed})] + [
        f"embedding {group}" for group in sorted({row // 5 for row in changed})
    ]
    assert contents(path / "old") == contents(path / "new")


def test_appended_images_redo_the_last_group_of_each_part_only(copy):
    computed: list[str] = []
    write(copy, make_plan(rows=ROWS + 3), computed)
    assert computed == ["encode 7", "encode 8", "embedding 4", "embedding 5"]


@pytest.mark.parametrize(
    "changed",
    [
        {"meta": {"model": "m1", "lr": 0.2}},
        {"dtype": "float32"},
    ],
)
def test_a_changed_setting_of_one_part_leaves_the_files_of_the_other(copy, tmp_path, changed):
    before = contents(copy)
    plan = make_plan(parts=[ENCODE, replace(EMBEDDING, **changed)])
    computed: list[str] = []
    write(copy, plan, computed)
    assert computed == EMBEDDING_GROUPS
    after = contents(copy)
    assert {name for name in before if name not in after} == {name for name in before if name.startswith("embedding")}
    write(tmp_path / "new", plan)
    assert after == contents(tmp_path / "new")


def test_a_part_is_added_and_taken_away_without_redoing_the_other(expected, tmp_path):
    path, computed = tmp_path / "bank", []
    write(path, make_plan(parts=[EMBEDDING]), computed)
    write(path, make_plan(), computed)
    assert computed == EMBEDDING_GROUPS + ENCODE_GROUPS and contents(path) == expected[1]
    bank = write(path, make_plan(parts=[ENCODE]), computed)
    assert len(computed) == 13 and list(bank.parts) == ["encode"] and not list(path.glob("embedding-*"))


def test_another_image_shape_redoes_everything(copy):
    computed: list[str] = []
    write(copy, make_plan(meta={"model": "m1", "image_shape": [1, 2, 8]}), computed)
    assert computed == ENCODE_GROUPS + EMBEDDING_GROUPS


def test_another_shard_size_computes_nothing_again(copy):
    computed: list[str] = []
    bank = write(copy, make_plan(shard_rows=100), computed)
    assert computed == [] and len(list(copy.glob("encode-*"))) == 1 and verify(bank.path).problems == []


def test_new_names_of_the_same_images_compute_nothing_again(copy):
    computed: list[str] = []
    bank = write(copy, make_plan(source_names=[f"moved/{row}.png" for row in range(ROWS)]), computed)
    assert computed == [] and bank.source_name(4) == "moved/4.png" and verify(copy).problems == []


def test_the_old_bank_stays_whole_until_the_new_one_is_finished(expected, copy):
    plan = make_plan({0: "new"}, parts=[replace(part, meta={"model": "m2"}) for part in (ENCODE, EMBEDDING)])
    with BankWriter(copy, plan) as writer:
        write_pending(writer)
        old = LatentBank.open(copy)
        assert old.digest == expected[2].digest and verify(copy).problems == []
        assert writer.finish().digest != expected[2].digest
    assert torch.equal(old.tensor("latent"), expected[2].tensor("latent"))  # an open bank outlives its files' names


def test_only_a_complete_bank_of_all_that_is_asked_for_is_current(expected, copy):
    plan = expected[0]
    assert open_if_current(copy, plan).digest == expected[2].digest
    assert open_if_current(copy, make_plan(parts=[ENCODE])).digest == expected[2].digest
    more = make_plan(parts=[*plan.parts, Part("other", {})])
    for other in (make_plan({3: "new"}), more, make_plan(class_names=["a", "b", "c"])):
        assert open_if_current(copy, other) is None
    assert open_if_current(copy / "nowhere", plan) is None
    next(copy.glob("encode-00002-*")).unlink()
    assert open_if_current(copy, plan) is None


# ---- what does not fit


def test_a_row_that_overflows_the_dtype_is_refused_with_its_source(tmp_path):
    plan = make_plan()
    with BankWriter(tmp_path / "bank", plan) as writer:
        group = plan.groups("encode")[1]
        tensors = compute(plan, "encode", group.padded)
        tensors["latent"][1] = 1e6
        with pytest.raises(BankError, match=r"not finite in float16 for 1 of 3 images.*images/4.png.*float32"):
            writer.put("encode", group, tensors)


def test_tensors_unlike_those_of_other_groups_are_refused(tmp_path):
    plan = make_plan()
    first, second, *_ = plan.groups("encode")
    for reopened in (False, True):
        with BankWriter(tmp_path / "bank", plan) as writer:
            if not reopened:
                writer.put("encode", first, {"latent": torch.zeros(3, 2)})
            with pytest.raises(BankError, match=r"float16 \[3\].*those of the others.*float16 \[2\]"):
                writer.put("encode", second, {"latent": torch.zeros(3, 3)})
            with pytest.raises(BankError, match=r"'latent' has 2 rows for a group of 3"):
                writer.put("encode", second, {"latent": torch.zeros(2, 2)})
            with pytest.raises(BankError, match=r"'latent' has no rows for a group of 3"):
                writer.put("encode", second, {"latent": torch.tensor(1.0)})


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("error", (3,), r"'error' has the shape \[3\].*has a dot in its name, such as encode.error"),
        ("encode.map", (3, 2), r"'encode.map' has the shape \[3, 2\]"),
        ("tokens", (3, 2), r"'encode' gives tokens, which 'embedding' has: names are unique"),
    ],
)
def test_a_name_that_says_something_else_than_the_tensor_is_refused(tmp_path, name, shape, message):
    plan = make_plan()
    with BankWriter(tmp_path / "bank", plan) as writer:
        group = plan.groups("embedding")[0]
        writer.put("embedding", group, compute(plan, "embedding", group.padded))
        with pytest.raises(BankError, match=message):
            writer.put("encode", plan.groups("encode")[0], {name: torch.zeros(shape)})


@pytest.mark.parametrize("name", ["rows", "Encode", "a-b", "", "ddim.error"])
def test_a_part_whose_name_cannot_name_files_is_refused(name):
    with pytest.raises(BankError, match=rf"part '{name}': a part's name"):
        make_plan(parts=[Part(name, {})])


def test_two_parts_of_one_name_and_an_unknown_part_are_refused():
    with pytest.raises(BankError, match=r"part 'encode': a part's name is given once"):
        make_plan(parts=[ENCODE, ENCODE])
    with pytest.raises(BankError, match=r"no part 'ddim' in this bank; it has encode, embedding"):
        make_plan().groups("ddim")


def test_a_bank_without_rows_is_refused(tmp_path):
    with pytest.raises(BankError, match=r"no images"):
        BankWriter(tmp_path / "bank", make_plan(rows=0))


def test_names_that_are_no_utf8_are_kept(tmp_path):
    names = [os.fsdecode(b"caf\xe9/%d.png" % row) for row in range(ROWS)]
    bank = write(tmp_path / "bank", make_plan(source_names=names))
    assert bank.source_names == names and bank.rows_named(names[:3]).tolist() == [0, 1, 2]


# ---- who may write, and when it fails


def test_a_second_writer_is_refused_and_the_lock_ends_with_the_first(expected, tmp_path):
    plan = expected[0]
    with BankWriter(tmp_path / "bank", plan) as first:
        with pytest.raises(BankError, match=r"another process is writing this bank"):
            BankWriter(tmp_path / "bank", plan)
        first.put("encode", plan.groups("encode")[0], compute(plan, "encode", np.arange(3)))
    BankWriter(tmp_path / "bank", plan).close()


def test_the_lock_of_a_killed_process_is_free(expected, tmp_path):
    path = tmp_path / "bank"
    script = textwrap.dedent(f"""
        import sys, time
        sys.path.insert(0, {str(Path(__file__).parents[1])!r})
        from bank.banks import BankWriter, make_plan
        writer = BankWriter({str(path)!r}, make_plan())
        print("held", flush=True)
        time.sleep(60)
    """)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(BankError, match=r"another process"):
            BankWriter(path, expected[0])
    finally:
        process.kill()
        process.wait(timeout=10)
        process.stdout.close()
    write(path, expected[0])
    assert contents(path) == expected[1]


def test_a_full_disk_is_one_message_and_loses_nothing(expected, copy):
    """A real limit on file size, in a process of its own: the kernel cuts the write short."""
    plan = make_plan(parts=[replace(ENCODE, dtype="float32"), EMBEDDING])
    before = contents(copy)
    script = textwrap.dedent(f"""
        import sys, resource
        sys.path.insert(0, {str(Path(__file__).parents[1])!r})
        from bank.banks import *
        from dataclasses import replace
        plan = make_plan(parts=[replace(ENCODE, dtype="float32"), EMBEDDING])
        computed = []
        with BankWriter({str(copy)!r}, plan) as writer:
            resource.setrlimit(resource.RLIMIT_FSIZE, (850, 850))
            try:
                write_pending(writer, computed)
            except Exception as error:
                print(len(computed), type(error).__name__, error)
    """)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.startswith("2 BankWriteError") and "cannot be written: File too large" in result.stdout
    assert "start again to go on from there" in result.stdout
    assert {name: data for name, data in contents(copy).items() if name in before} == before
    assert LatentBank.open(copy).digest == expected[2].digest and verify(copy).problems == []
    computed: list[str] = []
    write(copy, plan, computed)
    assert computed == ENCODE_GROUPS[2:]  # the write that failed was the first shard's, of groups 0 and 1
    write(copy, expected[0])
    assert contents(copy) == before


def test_no_space_left_while_finishing_keeps_the_old_bank(expected, copy, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with BankWriter(copy, make_plan({4: "new"})) as writer:
        write_pending(writer)
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(BankError, match=r"No space left on device \(\d+ kB needed\); what was finished is"):
            writer.finish()
    monkeypatch.undo()
    assert LatentBank.open(copy).digest == expected[2].digest
    assert not list(copy.rglob("writing"))


def test_a_folder_that_cannot_be_made_or_written_is_named(expected, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(BankError, match=r"file/bank: cannot be written: Not a directory; choose a writable folder"):
        BankWriter(tmp_path / "file" / "bank", expected[0])

    def read_only(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(BankError, match=r"bank: cannot be written: Read-only file system"):
        BankWriter(tmp_path / "bank", expected[0])


def test_shards_of_wide_rows_have_fewer_of_them():
    wide = make_plan(parts=[replace(ENCODE, row_bytes=2**27)], shard_rows=100)
    narrow = make_plan(parts=[ENCODE], shard_rows=100)
    assert len(wide.layout("encode").shards) == len(wide.groups("encode")) > len(narrow.layout("encode").shards)

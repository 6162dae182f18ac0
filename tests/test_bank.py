"""The bank: what was written is what is read, whatever interrupted the writing and whoever else wrote."""

import errno
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamaug.bank import BankPlan, BankWriter, LatentBank, files, open_if_current
from streamaug.errors import BankError

ROWS, GROUP, SHARD = 23, 3, 6  # 8 groups, the last of 2 rows; 4 shards


def make_plan(changed: dict[int, str] | None = None, rows: int = ROWS, **settings) -> BankPlan:
    """Rows whose source hash is the sha256 of their number, or of what `changed` says."""
    sources = [(changed or {}).get(row, str(row)) for row in range(rows)]
    values = {
        "labels": np.arange(rows) % 3,
        "source_hashes": [hashlib.sha256(source.encode()).hexdigest() for source in sources],
        "source_names": [f"images/{row}.png" for row in range(rows)],
        "class_names": ["cat", "dog", "emu"],
        "meta": {"method": "test", "model": "m1", "image_shape": [1, 4, 4]},
        "shard_rows": SHARD,
        "group_rows": GROUP,
    }
    return BankPlan(**(values | settings))


def compute(plan: BankPlan, rows: np.ndarray) -> dict[str, torch.Tensor]:
    """Two tensors that depend on the row's source and the model alone."""
    seeds = [
        int.from_bytes(hashlib.sha256((plan.source_hashes[row] + plan.meta["model"]).encode()).digest()[:4], "big")
        for row in rows
    ]
    latent = torch.stack([torch.from_numpy(np.random.default_rng(s).normal(size=(2, 3, 3))) for s in seeds])
    return {"latent": latent, "tokens": torch.tensor([[s % 97, s % 89] for s in seeds])}


def write(path: Path, plan: BankPlan, computed: list[int] | None = None) -> LatentBank:
    with BankWriter(path, plan) as writer:
        for group in writer.pending():
            if computed is not None:
                computed.append(group.number)
            writer.put(group, compute(plan, group.padded))
        return writer.finish()


def contents(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> tuple[BankPlan, dict[str, bytes], LatentBank]:
    """An uninterrupted bank: its plan, its bytes, and itself."""
    path = tmp_path_factory.mktemp("bank") / "bank"
    plan = make_plan()
    bank = write(path, plan)
    return plan, contents(path), bank


@pytest.fixture
def copy(expected, tmp_path) -> Path:
    """A copy of the uninterrupted bank to be damaged."""
    return shutil.copytree(expected[2].path, tmp_path / "bank")


# ---- reading


def test_a_bank_gives_back_what_was_put_into_it(expected):
    plan, _, bank = expected
    everything = compute(plan, np.arange(ROWS))
    assert bank.num_rows == len(bank) == ROWS and bank.tensor_names == ["latent", "tokens"]
    assert torch.equal(bank.tensor("latent"), everything["latent"].half())
    assert torch.equal(bank.tensor("tokens"), everything["tokens"]) and bank.tensor("tokens").dtype == torch.int64
    assert bank.labels.tolist() == plan.labels.tolist() and bank.labels.dtype == np.int64
    assert bank.class_names == plan.class_names and bank.meta == plan.meta and bank.image_shape == (1, 4, 4)
    assert bank.source_hashes == plan.source_hashes and bank.source_names == plan.source_names
    assert bank.verify() == []


def test_the_files_of_a_bank_are_an_index_rows_and_shards(expected):
    names = [name.split("-")[0] for name in expected[1]]
    assert names == [".bank", "index.json", "rows", "shard", "shard", "shard", "shard"]


@settings(deadline=None, max_examples=60)
@given(rows=st.lists(st.integers(0, ROWS - 1), max_size=40))
def test_gather_equals_indexing_all_rows(expected, rows):
    _, _, bank = expected
    for name in bank.tensor_names:
        assert torch.equal(bank.gather(name, rows), bank.tensor(name)[rows])
        assert torch.equal(bank.gather(name, torch.tensor(rows, dtype=torch.int64)), bank.tensor(name)[rows])


@pytest.mark.parametrize("rows", [[-1], [0, ROWS]])
def test_a_row_outside_the_bank_is_refused(expected, rows):
    with pytest.raises(BankError, match=r"the bank has 0 to 22"):
        expected[2].gather("latent", rows)


def test_an_unknown_tensor_is_refused_with_those_there_are(expected):
    with pytest.raises(BankError, match=r"no tensor 'pooled'; this bank has latent, tokens"):
        expected[2].gather("pooled", [0])


def test_one_shard_is_mapped_and_writing_to_the_tensor_does_not_reach_the_file(tmp_path):
    bank = write(tmp_path / "bank", make_plan(shard_rows=100))
    before = contents(bank.path)
    assert bank.tensor("latent").data_ptr() == bank.tensor("latent").data_ptr()
    bank.tensor("latent").zero_()
    assert contents(bank.path) == before
    assert LatentBank.open(bank.path).tensor("latent").any()


def make_sparse_bank(path: Path, rows: int, shard_rows: int, shape: list[int]) -> None:
    """A bank of zeros that takes next to no disk: its shards are headers and holes."""
    columns = {
        "label": torch.zeros(rows, dtype=torch.int64),
        "source_hash": torch.zeros(rows, 32, dtype=torch.uint8),
    }
    row_file = path / "rows-0.safetensors"
    row_file.write_bytes(files.shard_bytes(columns, [("0", rows)]))
    shards = []
    for number, start in enumerate(range(0, rows, shard_rows)):
        count = min(shard_rows, rows - start)
        size = 2 * count * int(np.prod(shape))
        header = json.dumps({"latent": {"dtype": "F16", "shape": [count, *shape], "data_offsets": [0, size]}}).encode()
        file = path / f"shard-{number:05d}-0.safetensors"
        file.write_bytes(len(header).to_bytes(8, "little") + header)
        os.truncate(file, 8 + len(header) + size)
        shards.append(files.file_entry(file, count, sha256="0"))
    index = {
        "format": files.FORMAT,
        "version": files.VERSION,
        "num_rows": rows,
        "class_names": ["a"],
        "meta": {"image_shape": [3, 64, 64]},
        "fingerprint": "0",
        "rows": files.file_entry(row_file, rows),
        "shards": shards,
    }
    (path / files.INDEX).write_bytes(files.seal(index))


def test_a_million_rows_open_within_a_second(tmp_path):
    make_sparse_bank(tmp_path, rows=1_000_000, shard_rows=4096, shape=[4, 32, 32])
    began = time.perf_counter()
    bank = LatentBank.open(tmp_path)
    assert time.perf_counter() - began < 1
    assert bank.gather("latent", [0, 999_999, 5000]).shape == (3, 4, 32, 32)


def test_gathering_from_a_large_shard_makes_only_the_rows_resident(tmp_path):
    make_sparse_bank(tmp_path, rows=512, shard_rows=512, shape=[1 << 20])  # 2 MiB a row, 1 GiB in all
    bank = LatentBank.open(tmp_path)
    before = resident_bytes()
    gathered = bank.gather("latent", [2, 300, 511])
    assert resident_bytes() - before < 32 << 20
    assert gathered.shape == (3, 1 << 20)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


# ---- interruption


class Crash(BaseException):
    """The process ends here."""


def test_a_crash_at_every_file_operation_leaves_the_same_bank(expected, tmp_path, monkeypatch):
    plan, uninterrupted, _ = expected
    left = 0  # file operations until the crash

    def crashing(operation):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                raise Crash
            return operation(*args, **kwargs)

        return call

    monkeypatch.setattr(os, "fsync", crashing(lambda fd: None))
    for name in ("replace", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, crashing(getattr(os, name)))
    for moment in range(1000):
        path = tmp_path / str(moment)
        left, finished = moment, False
        with suppress(Crash):
            write(path, plan)
            finished = True
        left = 1000
        if not finished:
            (path / files.WORK / "writing").write_bytes(b"half of a fi")
        write(path, plan)
        assert contents(path) == uninterrupted, f"after a crash at operation {moment}"
        if finished:
            break
    assert moment > 40  # 8 groups, 4 shards, rows and index: three operations each, and the cleaning


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.matrix)])
def test_a_bank_killed_at_random_moments_is_byte_identical(expected, tmp_path, kills):
    plan, uninterrupted, _ = expected
    path = tmp_path / "bank"
    script = textwrap.dedent(f"""
        import sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import test_bank
        plan = test_bank.make_plan()
        print("ready", flush=True)
        with test_bank.BankWriter({str(path)!r}, plan) as writer:
            for group in writer.pending():
                time.sleep(0.01)
                writer.put(group, test_bank.compute(plan, group.padded))
            writer.finish()
        time.sleep(60)
    """)
    rng = random.Random(kills)
    for _ in range(kills):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
        try:
            assert process.stdout.readline() == b"ready\n"
            time.sleep(rng.uniform(0, 0.15))
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait(timeout=10)
            process.stdout.close()
    write(path, plan)
    assert contents(path) == uninterrupted


def test_a_finished_group_is_never_computed_again(expected, tmp_path):
    plan, uninterrupted, _ = expected
    with BankWriter(tmp_path / "bank", plan) as writer:
        for group in list(writer.pending())[2:5]:
            writer.put(group, compute(plan, group.padded))
        assert writer.done_rows == 9
    computed: list[int] = []
    write(tmp_path / "bank", plan, computed)
    assert computed == [0, 1, 5, 6, 7]
    assert contents(tmp_path / "bank") == uninterrupted


def test_groups_have_one_shape_and_the_last_is_padded(tmp_path):
    with BankWriter(tmp_path / "bank", make_plan()) as writer:
        groups = list(writer.pending())
    assert [len(group.padded) for group in groups] == [3] * 8
    assert groups[-1].rows.tolist() == [21, 22] and groups[-1].padded.tolist() == [21, 22, 22]


def test_an_unfinished_bank_cannot_be_opened_or_finished(tmp_path):
    plan = make_plan()
    with BankWriter(tmp_path / "bank", plan) as writer:
        writer.put(next(writer.pending()), compute(plan, np.arange(3)))
        with pytest.raises(BankError, match=r"7 of 8 groups are not computed yet"):
            writer.finish()
    with pytest.raises(BankError, match=r"unfinished bank: run `streamaug invert` again"):
        LatentBank.open(tmp_path / "bank")


# ---- change


@settings(deadline=None, max_examples=12)
@given(changed=st.sets(st.integers(0, ROWS - 1), min_size=1, max_size=4))
def test_changed_images_redo_their_groups_only_and_leave_no_trace_of_history(expected, tmp_path_factory, changed):
    path = tmp_path_factory.mktemp("changed")
    shutil.copytree(expected[2].path, path / "old")
    plan = make_plan({row: f"changed {row}" for row in changed})
    computed: list[int] = []
    write(path / "old", plan, computed)
    write(path / "new", plan)
    assert computed == sorted({row // GROUP for row in changed})
    assert contents(path / "old") == contents(path / "new")


def test_appended_images_redo_the_last_group_only(expected, copy):
    computed: list[int] = []
    write(copy, make_plan(rows=ROWS + 3), computed)
    assert computed == [7, 8]


@pytest.mark.parametrize("change", [{"meta": {"method": "test", "model": "m2"}}, {"dtype": "float32"}])
def test_another_model_or_dtype_redoes_everything(copy, tmp_path, change):
    plan = make_plan(**change)
    computed: list[int] = []
    write(copy, plan, computed)
    assert computed == list(range(8))
    write(tmp_path / "new", plan)
    assert contents(copy) == contents(tmp_path / "new")


def test_another_shard_size_computes_nothing_again(copy):
    computed: list[int] = []
    bank = write(copy, make_plan(shard_rows=100), computed)
    assert computed == [] and len(list(copy.glob("shard-*"))) == 1 and bank.verify() == []


def test_new_names_of_the_same_images_compute_nothing_again(copy):
    computed: list[int] = []
    bank = write(copy, make_plan(source_names=[f"moved/{row}.png" for row in range(ROWS)]), computed)
    assert computed == [] and bank.source_name(4) == "moved/4.png" and bank.verify() == []


def test_the_old_bank_stays_whole_until_the_new_one_is_finished(expected, copy):
    plan = make_plan({0: "new"}, meta=expected[0].meta | {"model": "m2"})
    with BankWriter(copy, plan) as writer:
        for group in writer.pending():
            writer.put(group, compute(plan, group.padded))
            old = LatentBank.open(copy)
            assert old.digest == expected[2].digest and old.verify() == []
        assert writer.finish().digest != expected[2].digest
    assert torch.equal(old.tensor("latent"), expected[2].tensor("latent"))  # an open bank outlives its files' names


def test_only_a_complete_bank_of_the_same_plan_is_current(expected, copy):
    plan = expected[0]
    assert open_if_current(copy, plan).digest == expected[2].digest
    assert open_if_current(copy, make_plan({3: "new"})) is None
    assert open_if_current(copy / "nowhere", plan) is None
    next(copy.glob("shard-00002-*")).unlink()
    assert open_if_current(copy, plan) is None


# ---- damage


def shard_of(path: Path, number: int) -> Path:
    return next(path.glob(f"shard-{number:05d}-*"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda path: os.truncate(shard_of(path, 1), 200),
            r"shard-00001-\w+.safetensors: 200 bytes of \d+ are",
        ),
        (lambda path: shard_of(path, 2).unlink(), r"shard-00002-\w+.safetensors: missing"),
        (
            lambda path: shard_of(path, 0).write_bytes(b"\xff" * shard_of(path, 0).stat().st_size),
            r"cannot be read",
        ),
        (lambda path: (path / "index.json").write_text("{}"), r"not the index of a latent bank"),
        (lambda path: (path / "index.json").write_text("no"), r"not the index of a latent bank"),
    ],
)
def test_a_damaged_bank_is_named_and_repaired_by_writing_again(expected, copy, damage, message):
    damage(copy)
    with pytest.raises(BankError, match=message) as error:
        LatentBank.open(copy)
    assert "streamaug invert" in str(error.value)
    computed: list[int] = []
    write(copy, expected[0], computed)
    assert contents(copy) == expected[1]
    assert len(computed) <= 2


def test_a_changed_index_fails_its_checksum(copy):
    file = copy / "index.json"
    file.write_text(file.read_text().replace('"dog"', '"fox"'))
    with pytest.raises(BankError, match=r"its checksum does not fit"):
        LatentBank.open(copy)


def test_verify_names_changed_files_and_rows_that_are_not_finite(expected, copy):
    file = shard_of(copy, 1)
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    tensor = json.loads(data[8:start])["latent"]["data_offsets"][0]
    row_bytes = 2 * 3 * 3 * 2
    at = start + tensor + 2 * row_bytes  # row 2 of the shard is row 8 of the bank
    data[at : at + 2] = b"\x00\x7e"  # a float16 NaN
    file.write_bytes(data)
    problems = LatentBank.open(copy).verify()
    assert len(problems) == 2
    assert "its bytes are not those that were written" in problems[0] and file.name in problems[0]
    assert problems[1] == "row 8 (images/8.png): 'latent' is not finite"
    file.unlink()
    write(copy, expected[0])
    assert contents(copy) == expected[1]


def test_damaged_rows_are_not_carried_into_a_new_shard(expected, copy):
    file = shard_of(copy, 0)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    computed: list[int] = []
    bank = write(copy, make_plan({0: "new"}), computed)
    assert computed == [0, 1]  # group 1 is unchanged, but its stored rows are not trustworthy
    assert bank.verify() == []


def test_a_bank_of_a_newer_format_is_neither_opened_nor_overwritten(expected, copy):
    index = json.loads((copy / "index.json").read_text()) | {"version": 2}
    (copy / "index.json").write_text(json.dumps(index))
    before = contents(copy)
    for use in (lambda: LatentBank.open(copy), lambda: BankWriter(copy, expected[0])):
        with pytest.raises(BankError, match=r"bank format 2, this streamaug knows format 1: upgrade"):
            use()
    assert contents(copy) == before


def test_what_is_no_bank_is_refused(tmp_path, expected):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.png").write_bytes(b"precious")
    (tmp_path / "file").write_text("x")
    for name, message in (
        ("photos", "not a latent bank"),
        ("nowhere", "not a latent bank"),
        ("file", "a file;"),
    ):
        with pytest.raises(BankError, match=message):
            LatentBank.open(tmp_path / name)
    with pytest.raises(BankError, match=r"not a bank's \(holiday.png\); set bank.path to a new folder"):
        BankWriter(tmp_path / "photos", expected[0])
    assert os.listdir(tmp_path / "photos") == ["holiday.png"]


# ---- who may write, and when it fails


def test_a_second_writer_is_refused_and_the_lock_ends_with_the_first(expected, tmp_path):
    plan = expected[0]
    with BankWriter(tmp_path / "bank", plan) as first:
        with pytest.raises(BankError, match=r"another process is writing this bank"):
            BankWriter(tmp_path / "bank", plan)
        first.put(next(first.pending()), compute(plan, np.arange(3)))
    BankWriter(tmp_path / "bank", plan).close()


def test_the_lock_of_a_killed_process_is_free(expected, tmp_path):
    path = tmp_path / "bank"
    script = (
        "import sys, time, fcntl, os; os.makedirs(sys.argv[1]); f = open(sys.argv[1] + '/.bank-lock', 'ab');"
        "fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE)
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
    plan = expected[0]
    before = contents(copy)
    script = textwrap.dedent(f"""
        import sys, resource
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import test_bank, torch
        plan = test_bank.make_plan(dtype="float32")
        resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))
        with test_bank.BankWriter({str(copy)!r}, plan) as writer:
            done = 0
            try:
                for group in writer.pending():
                    writer.put(group, test_bank.compute(plan, group.padded))
                    done += 1
            except test_bank.BankError as error:
                print(done, error)
    """)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.startswith("1 ") and "cannot be written: File too large" in result.stdout
    assert "start again to go on from there" in result.stdout
    assert {name: data for name, data in contents(copy).items() if name in before} == before
    assert LatentBank.open(copy).verify() == []
    computed: list[int] = []
    write(copy, make_plan(dtype="float32"), computed)
    assert computed == list(range(2, 8))  # the write that failed was the first shard's, of groups 0 and 1
    write(copy, plan)
    assert contents(copy) == before


def test_no_space_left_while_finishing_keeps_the_old_bank(expected, copy, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    plan = make_plan({4: "new"})
    with BankWriter(copy, plan) as writer:
        for group in writer.pending():
            writer.put(group, compute(plan, group.padded))
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(BankError, match=r"No space left on device \(\d+ kB needed\); what was finished is"):
            writer.finish()
    monkeypatch.undo()
    assert LatentBank.open(copy).digest == expected[2].digest
    assert not list(copy.rglob("writing"))


def test_a_folder_that_cannot_be_made_or_written_is_named(expected, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(BankError, match=r"file/bank: cannot be written: Not a directory; set bank.path"):
        BankWriter(tmp_path / "file" / "bank", expected[0])

    def read_only(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(BankError, match=r"bank: cannot be written: Read-only file system"):
        BankWriter(tmp_path / "bank", expected[0])


def test_a_row_that_overflows_the_dtype_is_refused_with_its_source(tmp_path):
    plan = make_plan()
    with BankWriter(tmp_path / "bank", plan) as writer:
        group = list(writer.pending())[1]
        tensors = compute(plan, group.padded)
        tensors["latent"][1] = 1e6
        with pytest.raises(BankError, match=r"not finite in float16 for 1 of 3 images.*images/4.png.*float32"):
            writer.put(group, tensors)


def test_groups_with_other_tensors_or_counts_are_refused(tmp_path):
    plan = make_plan()
    with BankWriter(tmp_path / "bank", plan) as writer:
        first, second, *_ = writer.pending()
        writer.put(first, {"latent": torch.zeros(3, 2)})
        with pytest.raises(BankError, match=r"float16 \[3\].*those of the others.*float16 \[2\]"):
            writer.put(second, {"latent": torch.zeros(3, 3)})
        with pytest.raises(BankError, match=r"'latent' has 2 rows for a group of 3"):
            writer.put(second, {"latent": torch.zeros(2, 2)})


def test_a_bank_without_rows_is_refused(tmp_path):
    with pytest.raises(BankError, match=r"no images"):
        BankWriter(tmp_path / "bank", make_plan(rows=0))


def test_names_that_are_no_utf8_are_kept(tmp_path):
    names = [os.fsdecode(b"caf\xe9/%d.png" % row) for row in range(ROWS)]
    assert write(tmp_path / "bank", make_plan(source_names=names)).source_names == names

"""Damage: a file that was cut, lost, overwritten or written by another version is named, and writing repairs it."""

import json
import os

import pytest

from streamaug.bank import BankWriter, LatentBank
from streamaug.bank.verify import verify
from streamaug.errors import BankError

from .banks import contents, make_plan, shard_of, write


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda path: os.truncate(shard_of(path, 1), 200),
            r"encode-00001-\w+.safetensors: 200 bytes of \d+ are",
        ),
        (lambda path: shard_of(path, 2, "embedding").unlink(), r"embedding-00002-\w+.safetensors: missing"),
        (
            lambda path: shard_of(path, 0).write_bytes(b"\xff" * shard_of(path, 0).stat().st_size),
            r"cannot be read",
        ),
        (lambda path: (path / "index.json").write_text("{}"), r"not the index of a latent bank"),
        (lambda path: (path / "index.json").write_text("no"), r"not the index of a latent bank"),
        (lambda path: next(path.glob("rows-*")).unlink(), r"rows-\w+.safetensors: missing"),
    ],
)
def test_a_damaged_bank_is_named_and_repaired_by_writing_again(expected, copy, damage, message):
    damage(copy)
    with pytest.raises(BankError, match=message) as error:
        LatentBank.open(copy)
    assert "streamaug invert" in str(error.value)
    computed: list[str] = []
    write(copy, expected[0], computed)
    assert contents(copy) == expected[1]
    assert len(computed) <= 2


def test_a_changed_index_fails_its_checksum(copy):
    file = copy / "index.json"
    file.write_text(file.read_text().replace('"dog"', '"fox"'))
    with pytest.raises(BankError, match=r"its checksum does not fit"):
        LatentBank.open(copy)


def test_damaged_rows_are_not_carried_into_a_new_shard(copy):
    file = shard_of(copy, 0)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    computed: list[str] = []
    write(copy, make_plan({0: "new"}), computed)
    assert computed == ["encode 0", "encode 1", "embedding 0"]  # encode 1 is unchanged, but not trustworthy
    assert verify(copy).problems == []


@pytest.mark.parametrize(
    ("version", "remedy"),
    [
        (3, r"bank format 3, this streamaug knows format 2: upgrade streamaug"),
        (1, r"bank format 1, this streamaug knows format 2: delete the folder and run `streamaug invert` again"),
    ],
)
def test_a_bank_of_another_format_is_neither_opened_nor_overwritten(expected, copy, version, remedy):
    index = json.loads((copy / "index.json").read_text()) | {"version": version}
    (copy / "index.json").write_text(json.dumps(index))
    before = contents(copy)
    for use in (lambda: LatentBank.open(copy), lambda: BankWriter(copy, expected[0])):
        with pytest.raises(BankError, match=remedy):
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


def test_a_users_safetensors_beside_a_bank_are_left_alone(expected, copy):
    (copy / "my-model.safetensors").write_bytes(b"precious")
    write(copy, make_plan({0: "new"}))
    assert (copy / "my-model.safetensors").read_bytes() == b"precious"

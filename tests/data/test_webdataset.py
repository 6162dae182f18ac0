"""Tar shards: how samples are put together, where labels come from, and what is skipped with a reason."""

import gzip
import io
import json
import tarfile

import numpy as np
import pytest

from streamaug.config import DataConfig
from streamaug.data import load_splits
from streamaug.errors import DataError

from .pictures import noise


def png(seed: int) -> bytes:
    file = io.BytesIO()
    noise(seed).save(file, "PNG")
    return file.getvalue()


def make_shard(path, members: dict[str, bytes]):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def numbered(count: int, start: int = 0) -> dict[str, bytes]:
    pairs = ((f"{start + i:04d}", start + i) for i in range(count))
    return {
        name: data for key, i in pairs for name, data in ((f"{key}.png", png(i)), (f"{key}.cls", b"%d\n" % (i % 2)))
    }


def tar_config(root, **changes):
    values = {"image_size": 12, "channels": 3, "holdout": 0, "validation": 0} | changes
    return DataConfig(source="webdataset", root=root, **values)


def test_shards_are_read_in_order_and_numbers_name_the_classes(tmp_path):
    make_shard(tmp_path / "b.tar", numbered(4, start=4))
    make_shard(tmp_path / "a.tar", numbered(4))
    (tmp_path / "index.json").write_text("{}")
    splits = load_splits(tar_config(tmp_path))
    expected = np.stack([np.asarray(noise(i)).transpose(2, 0, 1) for i in range(8)])
    assert np.array_equal(splits.train.images, expected) and splits.notes == []
    assert splits.train.labels.tolist() == [0, 1] * 4 and splits.train.class_names == ["0", "1"]
    assert splits.train.sources[0] == str(tmp_path / "a.tar" / "0000")


def test_one_shard_may_be_the_root_and_another_the_test(tmp_path):
    train, test = make_shard(tmp_path / "train.tar", numbered(6)), make_shard(tmp_path / "test.tar", numbered(2, 50))
    splits = load_splits(tar_config(train, test_root=test, class_names=["cat", "dog"]))
    assert (len(splits.train), len(splits.test)) == (6, 2) and splits.test.class_names == ["cat", "dog"]


def test_names_in_cls_in_json_and_of_folders_are_classes(tmp_path):
    for kind, members in {
        "cls": {"0.png": png(0), "0.cls": b"emu", "1.png": png(1), "1.cls": b"ant"},
        "json": {"0.png": png(0), "0.json": b'{"label": "emu"}', "1.png": png(1), "1.json": b'{"label": "ant"}'},
        "folder": {"train/emu/0.png": png(0), "./train/ant/0.png": png(1)},
    }.items():
        train = load_splits(tar_config(make_shard(tmp_path / f"{kind}.tar", members))).train
        assert train.class_names == ["ant", "emu"] and train.labels.tolist() == [1, 0], kind


def test_a_class_called_by_a_number_in_a_folder_is_a_name(tmp_path):
    shard = make_shard(tmp_path / "x.tar", {"7/0.png": png(0), "10/0.png": png(1)})
    assert load_splits(tar_config(shard)).train.class_names == ["10", "7"]


def test_the_keys_choose_the_image_and_the_label(tmp_path):
    members = {}
    for i in range(2):
        members |= {
            f"x/{i}.JPG.png": png(i),
            f"x/{i}.seg.png": png(50 + i),
            f"x/{i}.json": json.dumps({"label": 9, "species": "ab"[i]}).encode(),
            f"x/{i}.breed": b"cd"[i : i + 1],
        }
    shard = make_shard(tmp_path / "x.tar", members)
    with pytest.raises(DataError, match=r"x.tar/x/0: several images \(jpg.png, seg.png\); .* data.image_key"):
        load_splits(tar_config(shard))
    train = load_splits(tar_config(shard, image_key="seg.png", label_key="species")).train
    assert np.array_equal(train.images[0], np.asarray(noise(50)).transpose(2, 0, 1))
    assert train.class_names == ["a", "b"]
    assert load_splits(tar_config(shard, image_key="seg.png", label_key="breed")).train.class_names == ["c", "d"]


def test_samples_that_cannot_be_used_are_listed_with_the_reason(tmp_path):
    members = numbered(2) | {
        "broken.png": png(60)[:50],
        "broken.cls": b"0",
        "bare.png": png(61),
        "empty.png": png(62),
        "empty.cls": b" ",
        "text.cls": b"1",
        "unlabelled.png": png(63),
        "unlabelled.json": b'{"caption": "a cat"}',
        "list.png": png(64),
        "list.json": b'{"label": [1, 2]}',
        "odd.png": png(65),
        "odd.json": b"{",
        "array.png": png(66),
        "array.json": b"[]",
        "._hidden.png": b"",
    }
    shard = make_shard(tmp_path / "x.tar", members)
    splits = load_splits(tar_config(shard))
    assert len(splits.train) == 2
    reasons = {note.split(": ")[0].rpartition("/")[2]: note.split(": ", 1)[1] for note in splits.notes}
    assert reasons.pop("broken")
    assert reasons.pop("odd").startswith("its .json cannot be parsed")
    assert reasons == {
        "bare": "no label: no .cls, no .json, and in no folder of its class",
        "empty": "its label file is empty",
        "text": "no image in this sample",
        "unlabelled": "its .json has no 'label' (it has caption); data.label_key names the field",
        "list": "'label' in its .json is [1, 2]; expected a number or a name",
        "array": "its .json holds no object with fields",
    }
    with pytest.raises(DataError, match=r"more than data.max_bad = 3"):
        load_splits(tar_config(shard, max_bad=3))


def test_keys_that_no_sample_has_are_named_in_every_reason(tmp_path):
    shard = make_shard(tmp_path / "x.tar", numbered(2))
    with pytest.raises(DataError, match=r"no image could be read:\n.*0000: no .jpg in this sample \(images: png\)"):
        load_splits(tar_config(shard, image_key="jpg"))
    with pytest.raises(DataError, match=r"no label: neither .kind nor .json"):
        load_splits(tar_config(shard, label_key="kind"))


def members_of(shard) -> list[tarfile.TarInfo]:
    with tarfile.open(shard) as tar:
        return tar.getmembers()


def test_a_shard_that_was_cut_off_gives_what_it_has_and_is_listed(tmp_path):
    shard = make_shard(tmp_path / "x.tar", numbered(8))
    image = members_of(shard)[12]  # of the last sample but one
    shard.write_bytes(shard.read_bytes()[: image.offset_data + 10])
    splits = load_splits(tar_config(shard))
    assert len(splits.train) == 6
    assert splits.notes == [
        f"skipped {shard}: damaged after 13 files: unexpected end of data; what follows is missing",
        f"skipped {shard}/0006: no label: no .cls, no .json, and in no folder of its class",
    ]


@pytest.mark.parametrize("into", [-1, 0, 1, 511, 512, 513])
def test_wherever_a_shard_is_cut_no_other_sample_is_lost(tmp_path, into):
    shard = make_shard(tmp_path / "x.tar", numbered(8))
    header = members_of(shard)[8].offset
    shard.write_bytes(shard.read_bytes()[: header + into])
    splits = load_splits(tar_config(shard))
    assert len(splits.train) == 4  # samples of whole files
    assert bool(splits.notes) == (into != 0)  # at a file's end a shard may end


def test_an_image_that_is_cut_off_is_named_with_what_is_there(tmp_path):
    shard = make_shard(tmp_path / "x.tar", {"cat/0.png": png(0), "cat/1.png": png(1)})
    image = members_of(shard)[1]
    shard.write_bytes(shard.read_bytes()[: image.offset_data + 10])
    notes = load_splits(tar_config(shard)).notes
    assert notes[1] == f"skipped {shard}/cat/1: cut off: 10 of {image.size} bytes are there"


def test_a_damaged_header_in_the_middle_is_noticed(tmp_path):
    shard = make_shard(tmp_path / "x.tar", numbered(8))
    at = members_of(shard)[8].offset
    data = bytearray(shard.read_bytes())
    data[at : at + 512] = bytes([255]) * 512
    shard.write_bytes(data)
    splits = load_splits(tar_config(shard))
    assert len(splits.train) == 4
    assert splits.notes == [f"skipped {shard}: damaged after 8 files: a damaged header; what follows is missing"]


def test_a_file_that_is_no_tar_is_listed_beside_those_that_are(tmp_path):
    make_shard(tmp_path / "a.tar", numbered(2))
    (tmp_path / "b.tar").write_bytes(gzip.compress(b"x" * 2000))
    (tmp_path / "c.tar").write_bytes(b"")
    splits = load_splits(tar_config(tmp_path))
    assert len(splits.train) == 2
    assert [note.split(": ")[:2] for note in splits.notes] == [
        [f"skipped {tmp_path / name}", "not an uncompressed tar file"] for name in ("b.tar", "c.tar")
    ]


def test_names_on_one_side_and_numbers_on_the_other_are_refused(tmp_path):
    train = make_shard(tmp_path / "train.tar", {"emu/0.png": png(0)})
    test = make_shard(tmp_path / "test.tar", numbered(2, 50))
    with pytest.raises(DataError, match=r"test.tar: labels are numbers, those of .*train.tar are names"):
        load_splits(tar_config(train, test_root=test))


def test_a_folder_without_shards_says_what_is_there(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"no .tar in it \(found a.tar.gz\); .*not compressed"):
        load_splits(tar_config(tmp_path / "data"))
    with pytest.raises(DataError, match=r"dta: no such folder \(did you mean 'data'\?\)"):
        load_splits(tar_config(tmp_path / "dta"))

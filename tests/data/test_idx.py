"""MNIST's file format: train and t10k, packed or not, and what each damaged file is told."""

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest

from streamaug.config import DataConfig, load
from streamaug.data import load_splits
from streamaug.data.sources import idx
from streamaug.errors import DataError


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def make_set(root: Path, name: str, count: int, *, seed: int = 0, packed: bool = True, separator: str = "-") -> None:
    """`count` random 28x28 images whose labels go 0, 1, ... 9, 0, ..."""
    root.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    arrays = {
        f"{name}-images{separator}idx3-ubyte": rng.integers(0, 256, (count, 28, 28), dtype=np.uint8),
        f"{name}-labels{separator}idx1-ubyte": (np.arange(count) % 10).astype(np.uint8),
    }
    for file, array in arrays.items():
        data = idx_bytes(array)
        (root / f"{file}{'.gz' if packed else ''}").write_bytes(gzip.compress(data) if packed else data)


def idx_config(root: Path, **changes) -> DataConfig:
    return DataConfig(source="idx", root=root, **({"image_size": 16, "validation": 0} | changes))


def test_debians_layout_is_read_with_its_own_test_set(tmp_path):
    make_set(tmp_path / "fashion-mnist", "train", 60)
    make_set(tmp_path / "fashion-mnist", "t10k", 20, seed=1)
    settings = load("fashion", [f"data.root={tmp_path / 'fashion-mnist'}", "data.shots=3", "data.validation=20"])
    splits = load_splits(settings.data)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (40, 20, 20)
    assert splits.train.image_shape == (1, 16, 16) and splits.train.class_names == [str(i) for i in range(10)]
    assert splits.test.labels.tolist() == [i % 10 for i in range(20)]
    assert splits.test.sources[3].endswith("fashion-mnist/t10k/3")
    assert len(splits.train.select_shots(settings.data.shots, 0)) == 30


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("separator", ["-", "."])
def test_packed_and_plain_files_and_both_spellings_give_the_stored_pixels(tmp_path, packed, separator):
    make_set(tmp_path / "data", "train", 20, packed=packed, separator=separator)
    train = load_splits(idx_config(tmp_path / "data", image_size=28, holdout=0)).train
    expected = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    assert np.array_equal(train.images[:, 0], expected)


def test_without_a_test_set_a_share_is_held_out(tmp_path):
    make_set(tmp_path / "data", "train", 40)
    splits = load_splits(idx_config(tmp_path / "data", holdout=10))
    assert (len(splits.train), len(splits.test)) == (30, 10)


@pytest.mark.parametrize("name", ["t10k", "train"])
def test_a_test_folder_replaces_the_own_test_set(tmp_path, name):
    make_set(tmp_path / "data", "train", 20)
    make_set(tmp_path / "data", "t10k", 10, seed=1)
    make_set(tmp_path / "other", name, 30, seed=2)
    test = load_splits(idx_config(tmp_path / "data", test_root=tmp_path / "other")).test
    assert len(test) == 30 and test.sources[0] == str(tmp_path / "other" / name / "0")


def test_a_known_data_set_has_its_classes_names(tmp_path, monkeypatch):
    labels = (np.arange(20) % 10).astype(np.uint8)
    names = [f"garment {i}" for i in range(10)]
    monkeypatch.setitem(idx._CLASS_NAMES, hashlib.sha256(labels.tobytes()).hexdigest(), names)
    make_set(tmp_path / "data", "train", 20)
    make_set(tmp_path / "data", "t10k", 10, seed=1)
    splits = load_splits(idx_config(tmp_path / "data"))
    assert splits.train.class_names == names and splits.test.class_names == names


def test_class_names_name_the_numbers(tmp_path):
    make_set(tmp_path / "data", "train", 20)
    names = list("abcdefghij")
    assert load_splits(idx_config(tmp_path / "data", holdout=0, class_names=names)).train.class_names == names
    with pytest.raises(DataError, match=r"label 2 is outside the 2 classes"):
        load_splits(idx_config(tmp_path / "data", holdout=0, class_names=["a", "b"]))
    with pytest.raises(DataError, match=r"no readable image of class 'k'"):
        load_splits(idx_config(tmp_path / "data", holdout=0, class_names=[*names, "k"]))


def test_a_folder_without_the_files_says_what_is_there_and_what_is_expected(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv").write_text("")
    with pytest.raises(DataError, match=r"no train-images-idx3-ubyte \(found train.csv\); expected train-images"):
        load_splits(idx_config(tmp_path / "data"))
    with pytest.raises(DataError, match=r"dta: no such folder \(did you mean 'data'\?\)"):
        load_splits(idx_config(tmp_path / "dta"))
    make_set(tmp_path / "data", "train", 10)
    (tmp_path / "data" / "t10k-labels-idx1-ubyte").write_bytes(b"")
    with pytest.raises(DataError, match=r"no t10k-images-idx3-ubyte"):
        load_splits(idx_config(tmp_path / "data"))


def cut(data: bytes) -> bytes:
    return data[:-1]


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("train-images-idx3-ubyte", cut, r"20 x 28 x 28 bytes are announced, 15679 are there"),
        ("train-images-idx3-ubyte", lambda data: b"", r"begins with nothing"),
        ("train-images-idx3-ubyte", lambda data: data[:9], r"begins with 00000803"),
        ("train-images-idx3-ubyte", lambda data: idx_bytes(np.zeros((0, 28, 28), np.uint8)), r"0 x 28 x 28"),
        ("train-images-idx3-ubyte", lambda data: b"\x89PNG" + data, r"begins with 89504e47.*begins with 00000803"),
        ("train-labels-idx1-ubyte", lambda data: idx_bytes(np.zeros(19, np.uint8)), r"20 images, .* 19 labels"),
    ],
)
def test_damaged_files_are_named_with_what_is_wrong(tmp_path, file, damage, message):
    make_set(tmp_path / "data", "train", 20, packed=False)
    path = tmp_path / "data" / file
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message) as error:
        load_splits(idx_config(tmp_path / "data", holdout=0))
    assert str(tmp_path / "data" / "train-") in str(error.value)


@pytest.mark.parametrize("damage", [cut, lambda data: b"not gzip", lambda data: data[:100] + bytes(50) + data[150:]])
def test_a_damaged_gzip_file_is_named(tmp_path, damage):
    make_set(tmp_path / "data", "train", 20)
    path = tmp_path / "data" / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz: cannot be read"):
        load_splits(idx_config(tmp_path / "data"))

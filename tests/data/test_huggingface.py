"""Folders written by `save_to_disk`: which columns and splits are used, and what each refusal names."""

import sys

import datasets
import numpy as np
import pytest
from PIL import Image

from streamaug.config import DataConfig
from streamaug.data import as_image_set, load_splits
from streamaug.errors import DataError, MissingExtra

from .pictures import noise


def table(count=8, start=0, label=None, names=("cat", "dog"), image="image", **columns):
    """A Dataset of `count` pictures; labels are a ClassLabel of `names` unless given."""
    values = {image: [noise(start + i) for i in range(count)]}
    features = datasets.Features({image: datasets.Image()})
    if label is None:
        values["label"], features["label"] = [i % 2 for i in range(count)], datasets.ClassLabel(names=list(names))
    else:
        values["label"], features["label"] = [label(i) for i in range(count)], datasets.Value(type_of(label(0)))
    for name, (feature, of) in columns.items():
        values[name], features[name] = [of(i) for i in range(count)], feature
    return datasets.Dataset.from_dict(values, features=features)


def type_of(value):
    return {int: "int64", str: "string", float: "float32"}[type(value)]


def saved(path, data):
    data.save_to_disk(str(path))
    return path


def hf_config(root, **changes):
    values = {"image_size": 8, "channels": 3, "holdout": 0, "validation": 0} | changes
    return DataConfig(source="huggingface", root=root, **values)


def test_a_saved_data_set_gives_its_pixels_labels_and_names(tmp_path):
    splits = load_splits(hf_config(saved(tmp_path / "data", table()), image_size=12))
    assert splits.train.labels.tolist() == [0, 1] * 4 and splits.train.class_names == ["cat", "dog"]
    expected = np.stack([np.asarray(noise(i)).transpose(2, 0, 1) for i in range(8)])
    assert np.array_equal(splits.train.images, expected)
    assert splits.train.sources[3] == f"{tmp_path / 'data'}/data/3" and splits.notes == []


@pytest.mark.parametrize("held", ["test", "validation"])
def test_the_own_test_split_is_held_out(tmp_path, held):
    both = datasets.DatasetDict({"train": table(), held: table(4, start=50)})
    splits = load_splits(hf_config(saved(tmp_path / "data", both), holdout=99))
    assert len(splits.train) == 8 and len(splits.test) == 4
    assert splits.train.sources[0].endswith("/train/0") and splits.test.sources[0].endswith(f"/{held}/0")


def test_a_split_that_is_not_used_is_noted(tmp_path):
    three = datasets.DatasetDict({"train": table(), "validation": table(2, 70), "test": table(4, start=50)})
    splits = load_splits(hf_config(saved(tmp_path / "data", three)))
    assert len(splits.test) == 4 and splits.notes == [f"{tmp_path / 'data'}: not used: split validation"]


def test_without_a_test_split_a_share_is_held_out(tmp_path):
    two = datasets.DatasetDict({"train": table(), "extra": table(4, start=50)})
    splits = load_splits(hf_config(saved(tmp_path / "data", two), holdout=4))
    assert (len(splits.train), len(splits.test)) == (4, 4) and "not used: split extra" in splits.notes[0]


def test_a_test_folder_is_matched_by_class_name(tmp_path):
    root = saved(tmp_path / "train", datasets.DatasetDict({"train": table()}))
    held = saved(tmp_path / "test", table(4, start=50, names=("dog", "cat")))
    assert load_splits(hf_config(root, test_root=held)).test.labels.tolist() == [1, 0, 1, 0]
    two = datasets.DatasetDict({"train": table(4, start=90), "test": table(6, start=50)})
    assert len(load_splits(hf_config(root, test_root=saved(tmp_path / "two", two))).test) == 6


def test_splits_that_cannot_be_told_apart_are_listed(tmp_path):
    two = datasets.DatasetDict({"part1": table(), "part2": table()})
    with pytest.raises(DataError, match=r"no split 'train'; it has part1, part2"):
        load_splits(hf_config(saved(tmp_path / "data", two)))


def test_labels_may_be_numbers_or_names(tmp_path):
    numbers = load_splits(hf_config(saved(tmp_path / "numbers", table(label=lambda i: i % 2)))).train
    assert numbers.class_names == ["0", "1"] and numbers.labels.tolist() == [0, 1] * 4
    root = saved(tmp_path / "names", table(label=lambda i: ("emu", "ant")[i % 2]))
    names = load_splits(hf_config(root)).train
    assert names.class_names == ["ant", "emu"] and names.labels.tolist() == [1, 0] * 4
    ordered = load_splits(hf_config(root, class_names=["emu", "ant"])).train
    assert ordered.class_names == ["emu", "ant"] and ordered.labels.tolist() == [0, 1] * 4
    with pytest.raises(DataError, match=r"class 'ant' is not among those of data.class_names.*emu, bee"):
        load_splits(hf_config(root, class_names=["emu", "bee"]))


@pytest.mark.parametrize(("value", "shown"), [(0.5, "0.5"), (None, "None")])
def test_a_label_that_is_neither_number_nor_name_is_refused_with_its_row(tmp_path, value, shown):
    data = table(kind=(datasets.Value("float32"), lambda i: value))
    with pytest.raises(DataError, match=rf"'kind' of row 0 is {shown}; expected one number or one name"):
        load_splits(hf_config(saved(tmp_path / "data", data), label_key="kind"))


def test_several_columns_of_images_or_labels_ask_for_the_key(tmp_path):
    mask = (datasets.Image(), lambda i: noise(90 + i))
    coarse = (datasets.ClassLabel(names=["pet"]), lambda i: 0)
    root = saved(tmp_path / "data", table(mask=mask, coarse=coarse))
    with pytest.raises(DataError, match=r"several columns of images \(image, mask\); name one with data.image_key"):
        load_splits(hf_config(root))
    with pytest.raises(DataError, match=r"several columns of labels \(label, coarse\); name one with data.label_key"):
        load_splits(hf_config(root, image_key="mask"))
    train = load_splits(hf_config(root, image_key="mask", label_key="coarse")).train
    assert train.class_names == ["pet"]
    with pytest.raises(DataError, match=r"no column 'imgae' \(did you mean 'image'\?\); it has image, label"):
        load_splits(hf_config(root, image_key="imgae"))
    with pytest.raises(DataError, match=r"column 'label' cannot be read as images"):
        load_splits(hf_config(root, image_key="label", label_key="label"))


def test_a_table_without_images_says_what_it_has(tmp_path):
    root = saved(tmp_path / "data", datasets.Dataset.from_dict({"text": ["a"], "label": [0]}))
    with pytest.raises(DataError, match=r"no column of images \(found text, label\)"):
        load_splits(hf_config(root))


def test_a_data_set_object_is_read_whatever_its_format_and_order():
    config = DataConfig(image_size=8, channels=3)
    plain = as_image_set(table(), config)
    assert plain.labels.tolist() == [0, 1] * 4 and plain.sources[0] == "Dataset/data/0"
    assert as_image_set(table().with_format("torch"), config).hashes == plain.hashes
    assert as_image_set(table().select([3, 1]), config).hashes == [plain.hashes[3], plain.hashes[1]]
    with pytest.raises(DataError, match=r"a IterableDataset is no data set"):
        as_image_set(table().to_iterable_dataset(), config)


def test_damaged_and_missing_images_are_skipped_and_turned_ones_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    noise(7).save(tmp_path / "turned.png", exif=exif)
    contents = [None, b"", b"no image", (tmp_path / "turned.png").read_bytes()]
    data = datasets.Dataset.from_dict(
        {"image": [None if value is None else {"bytes": value, "path": None} for value in contents], "label": [0] * 4},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat"])}),
    )
    splits = load_splits(hf_config(saved(tmp_path / "data", data), image_size=12))
    assert np.array_equal(splits.train.images[0], np.asarray(noise(7))[::-1, ::-1].transpose(2, 0, 1))
    assert [note.rpartition("/")[2] for note in splits.notes] == [
        "0: no image in this row",
        "1: not an image, or of an unknown format",
        "2: not an image, or of an unknown format",
    ]


def test_a_folder_of_another_kind_says_what_is_expected(tmp_path):
    with pytest.raises(DataError, match=r"neither dataset_dict.json nor state.json; expected .* save_to_disk"):
        load_splits(hf_config(tmp_path))
    with pytest.raises(DataError, match=r"nothing: no such folder"):
        load_splits(hf_config(tmp_path / "nothing"))
    root = saved(tmp_path / "data", table())
    next(root.glob("*.arrow")).write_bytes(b"")
    with pytest.raises(DataError, match=r"data: cannot be read: "):
        load_splits(hf_config(root))


def test_without_datasets_the_extra_is_named(tmp_path, monkeypatch):
    root = saved(tmp_path / "data", table())
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"datasets is not installed.*streamaug\[huggingface\]"):
        load_splits(hf_config(root))

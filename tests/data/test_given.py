"""Data sets that exist in Python: all forms that `as_image_set` takes, and what it refuses."""

import logging

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder

from streamaug.config import DataConfig
from streamaug.data import ImageSet, as_image_set, load_splits
from streamaug.errors import DataError

from .pictures import folder_config, make_folder, noise

CONFIG = DataConfig(image_size=8, channels=3)
PAIRS = [(noise(i), i % 3) for i in range(9)]


def test_an_image_set_is_returned_as_it_is():
    images = ImageSet.from_arrays(np.zeros((2, 1, 4, 4), np.uint8), [0, 1], ["a", "b"])
    assert as_image_set(images, CONFIG) is images


def test_a_list_of_pairs_is_numbered_and_named_by_class_names():
    images = as_image_set(PAIRS, CONFIG)
    assert images.labels.tolist() == [0, 1, 2] * 3 and images.class_names == ["0", "1", "2"]
    assert images.sources[4] == "list/data/4" and images.image_shape == (3, 8, 8)
    assert as_image_set(PAIRS, CONFIG.model_copy(update={"class_names": ["x", "y", "z"]})).class_names == [
        "x",
        "y",
        "z",
    ]


@pytest.mark.parametrize("as_text", [True, False])
def test_a_path_is_read_as_a_folder_per_class(tmp_path, as_text):
    root = make_folder(tmp_path / "data", {"cat": 3, "dog": 2})
    images = as_image_set(str(root) if as_text else root, CONFIG)
    expected = load_splits(folder_config(root, holdout=0)).train
    assert images.hashes == expected.hashes and images.class_names == ["cat", "dog"]


def test_a_torch_data_set_of_tensors_is_read():
    pixels = torch.arange(2 * 3 * 8 * 8, dtype=torch.uint8).reshape(2, 3, 8, 8)
    images = as_image_set(TensorDataset(pixels, torch.tensor([0, 1])), CONFIG)
    assert np.array_equal(images.images, pixels.numpy())


def test_a_part_of_a_data_set_keeps_the_names_of_the_whole(tmp_path):
    whole = ImageFolder(str(make_folder(tmp_path / "data", {"cat": 3, "dog": 3, "emu": 3})))
    images = as_image_set(Subset(whole, [8, 0]), CONFIG)
    assert images.class_names == ["cat", "dog", "emu"] and images.labels.tolist() == [2, 0]
    assert [source.split("/")[-2:] for source in images.sources] == [["emu", "002.png"], ["cat", "000.png"]]
    nested = as_image_set(Subset(Subset(whole, [8, 0]), [1]), CONFIG)
    assert nested.class_names == ["cat", "dog", "emu"] and nested.sources == images.sources[1:]


def test_a_part_that_names_its_classes_is_believed(tmp_path):
    whole = ImageFolder(str(make_folder(tmp_path / "data", {"cat": 3, "dog": 3, "emu": 3})))
    part = Subset(whole, [8, 0])
    part.classes = ["a", "b", "c"]
    assert as_image_set(part, CONFIG).class_names == ["a", "b", "c"]


class Endless(IterableDataset):
    def __iter__(self):
        return iter(PAIRS)


@pytest.mark.parametrize("given", [Endless(), 7, None, iter(PAIRS), {"train": PAIRS}])
def test_what_has_no_length_and_no_items_is_refused(given):
    with pytest.raises(DataError, match=r"is no data set with __len__ and __getitem__.*a list, a Hugging Face Dataset"):
        as_image_set(given, CONFIG)


def test_no_image_at_all_is_refused():
    with pytest.raises(DataError, match=r"list: no image"):
        as_image_set([], CONFIG)


def test_a_negative_label_is_refused_by_name():
    with pytest.raises(DataError, match=r"list/data/1: label -1 is outside the 2 classes"):
        as_image_set([(noise(0), 1), (noise(1), -1)], CONFIG)


def test_skipped_images_are_logged(tmp_path, caplog):
    root = make_folder(tmp_path / "data", {"cat": 3})
    (root / "cat" / "text.png").write_text("no image")
    with caplog.at_level(logging.WARNING, "streamaug"):
        assert len(as_image_set(root, CONFIG)) == 3
    assert "text.png: not an image" in caplog.text


def test_only_class_names_give_three_empty_sets_that_know_them():
    splits = load_splits(DataConfig(source="classes", class_names=["cat", "dog"], image_size=16, channels=3))
    for images in (splits.train, splits.validation, splits.test, splits.unlabelled):
        assert len(images) == 0 and images.class_names == ["cat", "dog"] and images.image_shape == (3, 16, 16)
    assert splits.notes == [] and splits.train.select_shots(None, 0).tolist() == []
    with pytest.raises(DataError, match=r"class 'cat' has 0 images.*set data.shots to null"):
        splits.train.select_shots(2, 0)
    with pytest.raises(DataError, match=r"data.class_names: 'cat' is given twice"):
        load_splits(DataConfig(source="classes", class_names=["cat", "dog", "cat"]))


def test_free_memory_is_known_here_and_images_are_read_where_it_is_not(monkeypatch):
    from streamaug.data import source

    assert 2**20 < source._free_bytes() < 2**50
    monkeypatch.setattr(source, "_free_bytes", lambda: None)
    assert len(as_image_set(PAIRS, CONFIG)) == 9

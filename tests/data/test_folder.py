"""A folder per class: what is read, in which order, what is held out, and what each refusal says."""

import os
from pathlib import Path

import pytest

from streamaug.data import load_splits
from streamaug.errors import DataError

from .pictures import folder_config, make_folder, noise


def test_a_folder_is_read_in_sorted_order_with_a_class_per_folder(tmp_path):
    make_folder(tmp_path / "data", {"dog": 4, "cat": 6})
    (tmp_path / "data" / ".cache").mkdir()
    (tmp_path / "data" / "cat" / ".hidden.png").write_bytes(b"")
    (tmp_path / "data" / "cat" / "notes.txt").write_text("not an image")
    train = load_splits(folder_config(tmp_path / "data", holdout=0)).train
    assert train.class_names == ["cat", "dog"]
    assert [Path(source).name for source in train.sources[:6]] == [f"{i:03d}.png" for i in range(6)]
    assert train.labels.tolist() == [0] * 6 + [1] * 4
    assert train.image_shape == (3, 8, 8)


def test_links_capital_suffixes_and_paths_with_dots_are_followed(tmp_path):
    make_folder(tmp_path / "real", {"a": 2, "b": 2})
    (tmp_path / "data" / "b").mkdir(parents=True)
    noise(1).save(tmp_path / "data" / "b" / "X.JPEG")
    (tmp_path / "data" / "b" / "linked.png").symlink_to(tmp_path / "real" / "b" / "000.png")
    (tmp_path / "data" / "a").symlink_to(tmp_path / "real" / "a")
    train = load_splits(folder_config(tmp_path / "real" / ".." / "data", holdout=0)).train
    assert train.labels.tolist() == [0, 0, 1, 1]


def test_where_the_folder_lies_does_not_change_the_split(tmp_path):
    for name in ("here", "there"):
        make_folder(tmp_path / name, {"a": 9, "b": 9})
    here, there = (load_splits(folder_config(tmp_path / name)).test for name in ("here", "there"))
    assert [Path(source).parts[-2:] for source in here.sources] == [Path(s).parts[-2:] for s in there.sources]


def test_an_added_image_moves_at_most_one_image_of_its_class_into_or_out_of_the_test(tmp_path):
    root = make_folder(tmp_path / "data", {"a": 20, "b": 20})
    before = set(load_splits(folder_config(root)).test.sources)
    noise(99).save(root / "a" / "0000.png")
    after = set(load_splits(folder_config(root)).test.sources)
    assert len(before - after) <= 1


def test_a_test_folder_is_mapped_by_class_name(tmp_path):
    root = make_folder(tmp_path / "train", {"a": 3, "b": 3, "c": 3})
    held = make_folder(tmp_path / "test", {"c": 1, "a": 2, "b": 1}, start=50_000)
    splits = load_splits(folder_config(root, test_root=held))
    assert splits.test.labels.tolist() == [0, 0, 1, 2] and len(splits.train) == 9


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({"a": 1, "b": 1, "bird": 1}, r"class 'bird' is not among those of .*train: a, b"),
        ({"a": 1}, r"test: no class 'b'; .*train has a, b"),
    ],
)
def test_a_test_folder_with_other_classes_is_refused_by_name(tmp_path, classes, message):
    root = make_folder(tmp_path / "train", {"a": 3, "b": 3})
    held = make_folder(tmp_path / "test", classes, start=50_000)
    with pytest.raises(DataError, match=message):
        load_splits(folder_config(root, test_root=held))


def test_pixels_of_a_test_image_never_stay_in_train_or_validation(tmp_path):
    root = make_folder(tmp_path / "train", {"a": 8, "b": 8})
    held = make_folder(tmp_path / "test", {"a": 2, "b": 2}, start=50_000)
    (held / "a" / "copy.png").write_bytes((root / "a" / "003.png").read_bytes())
    noise(1002).save(held / "b" / "copy.bmp")  # the pixels of b/002.png in another format
    (root / "b" / "twin.png").write_bytes((root / "b" / "007.png").read_bytes())
    (root / "a" / "wrong.png").write_bytes((root / "b" / "007.png").read_bytes())
    splits = load_splits(folder_config(root, test_root=held))
    assert len(splits.train) == 16
    assert not set(splits.train.hashes) & set(splits.test.hashes)
    assert splits.notes == [
        "2 train images dropped: the same pixels as a test image",
        "2 train images repeat the pixels of another train image (kept)",
        "1 train images have the pixels of an image of another class (kept)",
    ]


def test_a_test_folder_that_is_the_training_folder_is_refused(tmp_path):
    root = make_folder(tmp_path / "train", {"a": 3, "b": 3})
    with pytest.raises(DataError, match=r"every train image of class 'a' has the same pixels as a test image"):
        load_splits(folder_config(root, test_root=root))


def test_a_misspelt_folder_names_the_nearest(tmp_path):
    make_folder(tmp_path / "photos", {"a": 1})
    with pytest.raises(DataError, match=r"fotos: no such folder \(did you mean 'photos'\?\).*root/cat/001.png"):
        load_splits(folder_config(tmp_path / "fotos"))


def test_a_file_an_empty_folder_and_a_flat_folder_say_the_layout(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "flat").mkdir()
    noise(0).save(tmp_path / "flat" / "one.png")
    for name, found in (("file", "a file"), ("empty", "is empty"), ("flat", "holds one.png and no folder")):
        with pytest.raises(DataError, match=rf"{name}: {found}; expected one folder of images per class"):
            load_splits(folder_config(tmp_path / name))


def test_a_class_without_images_is_named_with_what_was_found(tmp_path):
    make_folder(tmp_path / "data", {"a": 2})
    (tmp_path / "data" / "b" / "nested").mkdir(parents=True)
    with pytest.raises(DataError, match=r"class 'b' has no image \(found nested\).*\.png"):
        load_splits(folder_config(tmp_path / "data"))


def test_bad_files_are_skipped_and_listed_up_to_the_limit_then_refused_with_reasons(tmp_path):
    root = make_folder(tmp_path / "data", {"a": 4, "b": 4})
    whole = (root / "a" / "000.png").read_bytes()
    (root / "a" / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (root / "a" / "empty.jpg").write_bytes(b"")
    (root / "b" / "text.png").write_text("no image")
    (root / "b" / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(root / "b" / "pipe.png")
    splits = load_splits(folder_config(root, holdout=0, max_bad=5))
    assert len(splits.train) == 8
    assert [note.split(":")[0].split("/")[-1] for note in splits.notes] == [
        "empty.jpg",
        "truncated.png",
        "dangling.png",
        "pipe.png",
        "text.png",
    ]
    with pytest.raises(DataError) as error:
        load_splits(folder_config(root, holdout=0, max_bad=3))
    message = str(error.value)
    assert "more than data.max_bad = 3" in message and "pipe.png: not a regular file" in message
    assert "empty.jpg: not an image" in message and "dangling.png: no such file" in message


def test_a_class_whose_files_are_all_bad_is_refused_with_the_list(tmp_path):
    root = make_folder(tmp_path / "data", {"a": 2})
    (root / "b").mkdir()
    (root / "b" / "text.png").write_text("no image")
    with pytest.raises(DataError, match=r"no readable image of class 'b':\n.*text.png: not an image"):
        load_splits(folder_config(root))

"""Data set classes by import path: what is constructed, what its items may be, and what each refusal names."""

import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from streamaug.config import DataConfig
from streamaug.data import load_splits
from streamaug.errors import DataError

from .pictures import make_folder, noise

FOLDER = "torchvision.datasets.ImageFolder"


def imported_config(source: str, **changes) -> DataConfig:
    return DataConfig(source=source, **({"image_size": 8, "channels": 3, "holdout": 0, "validation": 0} | changes))


class Pictures:
    """`count` pictures of two classes; what a picture is and how it is labelled can be replaced."""

    classes = ("cat", "dog")

    def __init__(self, count=8, start=0, image=None, label=None):
        self.count, self.start = count, start
        self.image = image or (lambda i: noise(self.start + i))
        self.label = label or (lambda i: i % 2)

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return self.image(i), self.label(i)


@pytest.fixture(autouse=True)
def own_module(monkeypatch):
    module = types.ModuleType("own_data")
    module.Pictures, module.number, module.plain = Pictures, 7, lambda: object()
    monkeypatch.setitem(sys.modules, "own_data", module)
    return module


def load(**options):
    return load_splits(imported_config("own_data.Pictures", options=options))


def test_a_torchvision_class_gives_what_the_folder_source_gives(tmp_path):
    root = make_folder(tmp_path / "data", {"cat": 5, "dog": 6})
    ours = load_splits(imported_config(FOLDER, root=root, holdout=4))
    folder = load_splits(DataConfig(source="folder", root=root, image_size=8, channels=3, holdout=4, validation=0))
    for one, other in ((ours.train, folder.train), (ours.test, folder.test)):
        assert one.hashes == other.hashes and one.sources == other.sources and one.class_names == other.class_names
        assert (one.labels == other.labels).all()


def test_an_option_named_root_is_as_good_as_root(tmp_path):
    root = make_folder(tmp_path / "data", {"cat": 2, "dog": 2})
    assert len(load_splits(imported_config(FOLDER, options={"root": str(root)})).train) == 4


def test_torchvisions_fake_data_has_numbers_for_names():
    options = {"size": 30, "image_size": [3, 10, 10], "num_classes": 3}
    train = load_splits(imported_config("torchvision.datasets.FakeData", options=options)).train
    assert train.class_names == ["0", "1", "2"] and train.image_shape == (3, 8, 8)


def test_test_options_are_added_to_the_options_and_give_the_held_out_images():
    splits = load_splits(
        imported_config("own_data.Pictures", options={"count": 6}, test_options={"start": 50}, holdout=99)
    )
    assert len(splits.train) == 6 and len(splits.test) == 6
    assert splits.test.sources[0] == "own_data.Pictures/test/0"
    assert not set(splits.train.hashes) & set(splits.test.hashes)


def test_a_test_root_gives_the_held_out_images_matched_by_name(tmp_path):
    root = make_folder(tmp_path / "train", {"b": 2, "c": 2})
    held = make_folder(tmp_path / "test", {"b": 1, "c": 3}, start=500)
    splits = load_splits(imported_config(FOLDER, root=root, test_root=held))
    assert splits.test.labels.tolist() == [0, 1, 1, 1]
    other = make_folder(tmp_path / "other", {"b": 1, "d": 3}, start=500)
    with pytest.raises(DataError, match=r"class 'd' is not among those of torchvision.datasets.ImageFolder.*: b, c"):
        load_splits(imported_config(FOLDER, root=root, test_root=other))


@pytest.mark.parametrize("label", [-1, 2])
def test_a_held_out_label_outside_the_classes_is_refused_by_name(label):
    test_options = {"start": 50, "label": lambda i: label if i == 3 else 0}
    with pytest.raises(DataError, match=rf"Pictures/test/3: label {label} is outside the 2 classes"):
        load_splits(imported_config("own_data.Pictures", test_options=test_options))


@pytest.mark.parametrize(
    "transform",
    [
        transforms.ToTensor(),
        transforms.PILToTensor(),
        v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]),
        v2.Compose([v2.ToImage(), v2.ToDtype(torch.bfloat16, scale=True)]),
        np.asarray,
    ],
)
def test_a_transform_inside_the_data_set_is_honoured(tmp_path, transform):
    root = make_folder(tmp_path / "data", {"cat": 2, "dog": 2})
    plain = load_splits(imported_config(FOLDER, root=root)).train.images
    given = load_splits(imported_config(FOLDER, root=root, options={"transform": transform})).train.images
    assert np.abs(plain.astype(int) - given).max() <= (2 if "bfloat16" in str(transform) else 0)


def test_a_transform_that_normalises_is_refused_with_the_range():
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(0.5, 0.5)])
    with pytest.raises(DataError, match=r"item 0 is an array of float32 \[3, 12, 12\] with values from -.*normalises"):
        load(image=lambda i: transform(noise(i)))


@pytest.mark.parametrize("label", [np.int64(1), np.uint8(1), torch.tensor(1), np.array(1), True])
def test_labels_of_every_integer_type_are_accepted(label):
    assert load(label=lambda i: label if i % 2 else type(label)(0) if label is True else 0).train.labels.sum() == 4


@pytest.mark.parametrize(
    ("label", "described"),
    [
        ("cat", r"'cat' \(str\)"),
        (1.0, r"1.0 \(float\)"),
        (None, r"None \(NoneType\)"),
        (torch.zeros(10), r"a Tensor of shape \[10\]"),
        ({"boxes": list(range(99))}, r"{'boxes': \[0, 1, .{30,60}\.\.\. \(dict\)"),
    ],
)
def test_a_label_that_is_no_int_is_refused_with_its_item(label, described):
    with pytest.raises(DataError, match=rf"label of item 3 is {described}; expected an int"):
        load(label=lambda i: label if i == 3 else 0)


@pytest.mark.parametrize("image", [None, "a/path.png", [[0, 1], [1, 0]], np.zeros((8, 8, 7)), torch.zeros(3, 0, 4)])
def test_an_item_that_is_no_image_is_refused_with_its_number(image):
    with pytest.raises(DataError, match=r"own_data.Pictures: the image of item 5 is .*; expected"):
        load(image=lambda i: image if i == 5 else noise(i))


def test_items_that_are_no_pair_are_refused(own_module):
    own_module.Pictures = type("Triples", (Pictures,), {"__getitem__": lambda self, i: {"image": 0, "label": 1}})
    with pytest.raises(DataError, match=r"item 0 is {'image': 0, 'label': 1} \(dict\); expected \(image, label\)"):
        load()


def test_damaged_images_are_skipped_up_to_the_limit_and_other_exceptions_are_not():
    def damaged(i):
        if i in (2, 3):
            raise UnidentifiedImageError(f"cannot identify image file {i}.jpg")
        return noise(i)

    assert load(image=damaged).notes == [
        f"skipped own_data.Pictures/train/{i}: cannot identify image file {i}.jpg" for i in (2, 3)
    ]
    with pytest.raises(DataError, match=r"more than data.max_bad = 1"):
        load_splits(imported_config("own_data.Pictures", options={"image": damaged}, max_bad=1))
    with pytest.raises(DataError, match=r"own_data.Pictures: item 0 raised ZeroDivisionError: division by zero"):
        load(image=lambda i: 1 / 0)


def test_an_image_that_cannot_be_decoded_is_a_damaged_one(tmp_path):
    noise(1, (64, 64)).save(tmp_path / "x.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "x.png").read_bytes()[:-80])
    splits = load(image=lambda i: Image.open(tmp_path / "cut.png") if i == 4 else noise(i))
    assert len(splits.train) == 7 and "Pictures/train/4: " in splits.notes[0]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("torchvison.datasets.CIFAR10", r"no module 'torchvison' \(did you mean 'torchvision'\?\); .*PYTHONPATH"),
        ("torchvision.dataset.CIFAR10", r"torchvision has no 'dataset' \(did you mean 'datasets'\?\)"),
        ("torchvision.datasets.CIFAR1O", r"torchvision.datasets has no 'CIFAR1O' \(did you mean 'CIFAR10+'\?\)"),
        ("own_data.number", r"own_data.number is 7 \(int\); expected the class of a data set"),
        ("own_data.plain", r"own_data.plain: a object is no data set with __len__ and __getitem__"),
    ],
)
def test_what_cannot_be_imported_names_the_nearest(source, message):
    with pytest.raises(DataError, match=message):
        load_splits(imported_config(source))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import no_such_package", r"importing bad_data raised ModuleNotFoundError: No module named 'no_such_package'"),
        ("1 / 0", r"importing bad_data raised ZeroDivisionError"),
    ],
)
def test_a_module_that_fails_is_quoted(tmp_path, monkeypatch, code, message):
    (tmp_path / "bad_data.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DataError, match=message):
        load_splits(imported_config("bad_data.Images"))


def test_the_constructors_own_error_is_quoted_with_the_arguments(tmp_path):
    with pytest.raises(DataError, match=r"data.options: Pictures\(cout=3\) raised TypeError: .*argument 'cout'"):
        load(cout=3)
    root = make_folder(tmp_path / "data", {"cat": 2})
    with pytest.raises(DataError, match=r"data.test_options: ImageFolder\(root='.*none'\) raised FileNotFoundError"):
        load_splits(imported_config(FOLDER, root=root, test_options={"root": str(tmp_path / "none")}))


def test_class_names_may_rename_but_not_reorder():
    config = imported_config("own_data.Pictures")
    named = config.model_copy(update={"class_names": ["Felis catus", "Canis familiaris"]})
    assert load_splits(named).train.class_names == ["Felis catus", "Canis familiaris"]
    for names, message in (
        (["dog", "cat"], r"in another order.*labels 0, 1, ... are cat, dog"),
        (["cat"], r"1 names, but own_data.Pictures has 2 classes: cat, dog"),
        (["pet", "pet"], r"two classes are called 'pet'"),
    ):
        with pytest.raises(DataError, match=message):
            load_splits(config.model_copy(update={"class_names": names}))


def test_names_in_several_words_are_joined_and_repeated_ones_refused(own_module):
    own_module.Pictures = type("Net", (Pictures,), {"classes": [("tench", "Tinca tinca"), ("crane",)]})
    assert load().train.class_names == ["tench, Tinca tinca", "crane"]
    own_module.Pictures = type("Net", (Pictures,), {"classes": [("crane",), ("crane",)]})
    with pytest.raises(DataError, match=r"two classes are called 'crane'; give data.class_names"):
        load()


def test_the_data_sets_own_files_name_the_images(tmp_path):
    root = make_folder(tmp_path / "data", {"cat": 3})
    files = [path for path, _ in ImageFolder(str(root)).samples]
    assert load_splits(imported_config(FOLDER, root=root)).train.sources == files

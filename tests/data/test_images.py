"""Image sets in memory: what fits together, which images are drawn, and what the trainer's DataLoader reads."""

import pickle

import numpy as np
import pytest

from streamaug.config import DataConfig
from streamaug.data import ImageDataset, ImageSet, load_splits
from streamaug.errors import DataError


@pytest.fixture(scope="module")
def train():
    return load_splits(DataConfig()).train


def test_shots_are_exact_reproducible_and_nested(train):
    three = train.select_shots(3, seed=7)
    assert np.bincount(train.labels[three]).tolist() == [3] * 10
    assert (three == train.select_shots(3, seed=7)).all()
    assert not np.array_equal(three, train.select_shots(3, seed=8))
    assert set(train.select_shots(1, seed=7)) < set(three)
    assert not np.array_equal(train.select_shots(3, seed=-1), train.select_shots(3, seed=-2))
    assert train.select_shots(None, seed=7).tolist() == list(range(1000))


def test_too_few_images_for_the_shots_names_the_class_and_its_count():
    images = ImageSet.from_arrays(np.zeros((3, 1, 2, 2), np.uint8), [0, 0, 1], ["cat", "dog"])
    with pytest.raises(DataError, match=r"class 'dog' has 1 images.*asks for 2.*at most 1"):
        images.select_shots(2, seed=0)


def test_a_label_outside_the_classes_is_refused_by_name():
    with pytest.raises(DataError, match=r"image/1: label 2 is outside the 2 classes"):
        ImageSet.from_arrays(np.zeros((2, 1, 2, 2), np.uint8), [0, 2], ["cat", "dog"])


@pytest.mark.parametrize("bad", [np.zeros((2, 1, 2, 2), np.float32), np.zeros((2, 2, 2), np.uint8)])
def test_images_of_another_type_or_shape_are_refused(bad):
    with pytest.raises(DataError, match=r"expected uint8 \[N, C, H, W\]"):
        ImageSet.from_arrays(bad, [0, 0], ["cat"])


def test_the_torch_data_set_yields_floats_and_survives_pickling(train):
    data = pickle.loads(pickle.dumps(ImageDataset(train)))
    image, label = data[5]
    assert len(data) == 1000 and data.transform is None and data.classes == train.class_names
    assert image.shape == (1, 8, 8) and str(image.dtype) == "torch.float32"
    assert np.array_equal((image * 255).round().numpy(), train.images[5]) and 0 <= image.min() <= 1
    assert type(label) is int and label == train.labels[5]


def test_all_images_in_their_own_order_are_not_copied():
    real = ImageSet.from_arrays(np.arange(12, dtype=np.uint8).reshape(3, 1, 2, 2), [0, 1, 0], ["a", "b"])
    assert real.subset(real.select_shots(None, seed=0)) is real
    assert real.subset([0, 2, 1]).sources == ["image/0", "image/2", "image/1"]

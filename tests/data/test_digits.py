"""scikit-learn's digits: how they are divided and scaled."""

import subprocess
import sys

import numpy as np
import pytest

from streamaug.config import DataConfig
from streamaug.data import load_splits
from streamaug.errors import MissingExtra


@pytest.fixture(scope="module")
def digits():
    return load_splits(DataConfig())


def test_digits_are_divided_1000_297_500_with_nothing_in_common(digits):
    assert (len(digits.train), len(digits.validation), len(digits.test)) == (1000, 297, 500)
    sources = [source for part in (digits.train, digits.validation, digits.test) for source in part.sources]
    assert len(set(sources)) == 1797
    hashes = [set(part.hashes) for part in (digits.train, digits.validation, digits.test)]
    assert not hashes[0] & hashes[1] and not hashes[0] & hashes[2] and not hashes[1] & hashes[2]
    assert digits.notes == []


def test_digits_are_proportionally_divided_and_scaled_to_the_full_range(digits):
    assert all(set(part.labels) == set(range(10)) for part in (digits.train, digits.validation, digits.test))
    assert digits.test.class_counts().min() >= 47
    assert digits.train.images.dtype == np.uint8 and digits.train.images.shape == (1000, 1, 8, 8)
    assert set(np.unique(digits.train.images)) == {round(v * 255 / 16) for v in range(17)}


def test_unlabelled_is_train_and_validation_and_nothing_of_the_test(digits):
    both = digits.unlabelled
    assert len(both) == 1297
    assert set(both.sources) == set(digits.train.sources) | set(digits.validation.sources)
    assert not set(both.hashes) & set(digits.test.hashes)


def test_the_split_does_not_depend_on_image_size_or_channels(digits):
    other = load_splits(DataConfig(image_size=16, channels=3))
    assert other.test.sources == digits.test.sources
    assert other.train.image_shape == (3, 16, 16)
    assert (other.train.images[:, 0] == other.train.images[:, 2]).all()


def test_another_split_seed_holds_out_other_images(digits):
    assert load_splits(DataConfig(), seed=1).test.sources != digits.test.sources


def test_data_without_torch(digits):
    code = (
        "import sys; from streamaug.data import load_splits; from streamaug.config import DataConfig;"
        "load_splits(DataConfig()); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_missing_scikit_learn_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtra, match=r"scikit-learn.*streamaug\[demo\]"):
        load_splits(DataConfig())

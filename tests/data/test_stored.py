"""Images for which memory has no room: kept in a file, used like the others."""

import gc
from pathlib import Path

import numpy as np
import pytest

from streamaug.config import DataConfig
from streamaug.data import Batches, ImageDataset, as_image_set, load_splits, source
from streamaug.data.images import Splits
from streamaug.data.stored import StoredImages, make_room
from streamaug.errors import DataError

DIGITS = DataConfig(holdout=500, validation=297)
RNG = np.random.default_rng(0)
PAIRS = [(RNG.integers(0, 256, (6, 5, 3), np.uint8), label % 3) for label in range(20)]
CONFIG = DataConfig(source="folder", root="nowhere", image_size=4, channels=3)


@pytest.fixture
def little_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(source, "_free_bytes", lambda: 100)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_sets_in_a_file_equal_those_in_memory(little_memory, monkeypatch, caplog):
    with caplog.at_level("INFO", "streamaug"):
        stored = load_splits(DIGITS)
    assert f"they are kept in a file under {little_memory} (TMPDIR)" in caplog.text
    assert not list(little_memory.iterdir()), "the file has no name"
    monkeypatch.undo()
    known: Splits = load_splits(DIGITS)
    for name in ("train", "validation", "test", "unlabelled"):
        there, here = getattr(stored, name), getattr(known, name)
        assert isinstance(there.images, StoredImages) and isinstance(here.images, np.ndarray)
        assert there.images.shape == here.images.shape and there.hashes == here.hashes and there.sources == here.sources
        assert np.array_equal(there.images[:], here.images) and np.array_equal(there.images[5:9], here.images[5:9])
    shots = stored.train.subset(stored.train.select_shots(2, seed=3))
    assert np.array_equal(shots.images[[3, 1]], known.train.images[known.train.select_shots(2, seed=3)[[3, 1]]])
    (pixels, labels), *others = Batches(shots, 15)
    assert pixels.shape == (15, 1, 8, 8) and labels.tolist() == shots.labels[:15].tolist() and len(others) == 1
    image, _ = ImageDataset(shots)[15]
    assert image.equal(others[0][0][0])


def test_sets_divided_from_one_another_share_the_file(little_memory):
    splits = load_splits(DIGITS)
    parts = (splits.train, splits.validation, splits.test, splits.unlabelled)
    assert len({id(part.images.file) for part in parts}) == 1


def test_the_file_goes_with_the_last_image(little_memory):
    images = as_image_set(PAIRS, CONFIG)
    assert str(little_memory) in Path("/proc/self/maps").read_text()
    del images
    gc.collect()
    assert str(little_memory) not in Path("/proc/self/maps").read_text()


def test_reading_an_image_does_not_change_the_file(little_memory):
    images = as_image_set(PAIRS, CONFIG)
    images.images[0][:] = 0
    assert images.images[0].any()


def test_a_full_disk_is_refused_before_an_image_is_read(little_memory, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(
        DataError, match=r"20 images of 48 bytes .* no room either \(No space left on device\): set TMPDIR"
    ):
        as_image_set(PAIRS, CONFIG)
    with pytest.raises(OSError, match="No space"):
        make_room((2, 3, 4, 4))

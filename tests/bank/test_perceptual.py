"""The perceptual hash: copies are near, other images are far, whatever the size."""

import io

import numpy as np
import pytest
from PIL import Image

from streamaug.data import perceptual
from streamaug.data.perceptual import HASH_DTYPE, default_distance, near_pairs, perceptual_hash


@pytest.fixture(scope="module")
def digits() -> np.ndarray:
    """scikit-learn's digits: uint8 [1797, 1, 8, 8]."""
    from sklearn.datasets import load_digits

    return np.round(load_digits().images * (255 / 16)).astype(np.uint8)[:, None]


def bits_between(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Bits in which the hashes of images differ, pair by pair."""
    bits = [np.unpackbits(perceptual_hash(images).view(np.uint8)).reshape(len(images), -1) for images in (one, two)]
    return (bits[0] != bits[1]).sum(1)


def noisy(images: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, 2, images.shape)
    return np.clip(images + noise, 0, 255).round().astype(np.uint8)


def recoded(images: np.ndarray, size: int) -> np.ndarray:
    """Each image as a JPEG of another size, read back at its own."""
    out = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image[0]).resize((size, size), Image.Resampling.BICUBIC).save(file, "JPEG", quality=75)
        read = Image.open(file).resize(image.shape[1:], Image.Resampling.LANCZOS)
        out.append(np.asarray(read)[None])
    return np.stack(out)


def test_few_digits_are_near_another_and_most_altered_copies_are_near_their_original(digits):
    hashes = perceptual_hash(digits)
    distance = default_distance(8, 8)
    assert distance == 2
    assert len([pair for pair in near_pairs(hashes, hashes, distance) if pair[0] < pair[1]]) <= 2  # of 1.6 million
    assert (bits_between(digits, noisy(digits)) <= distance).mean() > 0.95
    some = digits[:300]
    assert (bits_between(some, recoded(some, 32)) <= distance).mean() > 0.6


def test_larger_copies_are_found_and_few_other_images_are_near(digits):
    """Digits enlarged to 28 pixels; what Fashion-MNIST gives is in the docstring of `perceptual_hash`."""
    images = np.stack([np.asarray(_resized(image, 28))[None] for image in digits[:600]])
    distance = default_distance(28, 28)
    assert distance == 11
    hashes = perceptual_hash(images)
    near = [pair for pair in near_pairs(hashes, hashes, distance) if pair[0] < pair[1]]
    assert len(near) <= 2, "of 180,000 pairs"
    few = images[:200]
    assert (bits_between(few, noisy(few)) <= distance).mean() > 0.98
    assert (bits_between(few, recoded(few, 56)) <= distance).mean() > 0.98


def test_near_pairs_are_those_that_counting_bits_one_by_one_finds():
    rng = np.random.default_rng(0)
    ones, others = (np.frombuffer(rng.bytes(32 * count), HASH_DTYPE) for count in (20, 300))
    bits = [np.unpackbits(values.view(np.uint8)).reshape(-1, 256) for values in (ones, others)]
    apart = (bits[0][:, None] != bits[1][None]).sum(2)
    for distance in (90, 110, 128):
        pairs = sorted(near_pairs(ones, others, distance))
        assert pairs == [(i, j, apart[i, j]) for i, j in np.argwhere(apart <= distance)]


def test_the_hash_is_of_the_picture_and_not_of_its_size():
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (20, 3, 6, 6), dtype=np.uint8)
    at = [np.stack([np.asarray(_resized(image, size)).transpose(2, 0, 1) for image in small]) for size in (32, 64, 200)]
    assert (bits_between(at[0], at[1]) <= 11).all() and (bits_between(at[1], at[2]) <= 11).all()


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (1, 8, 8), (3, 40, 24)])
def test_any_shape_is_hashed_alone_or_with_others_and_flat_pictures_alike(shape):
    images = np.random.default_rng(0).integers(0, 256, (5, *shape), dtype=np.uint8)
    hashes = perceptual_hash(images)
    assert hashes.dtype == HASH_DTYPE and hashes.shape == (5,)
    assert (perceptual_hash(images[3:4]) == hashes[3:4]).all()
    assert perceptual_hash(images[:0]).shape == (0,)
    assert not perceptual_hash(np.full((1, *shape), 200, np.uint8)).view(np.uint8).any()


def _resized(image: np.ndarray, size: int) -> Image.Image:
    return Image.fromarray(image.transpose(1, 2, 0).squeeze()).resize((size, size), Image.Resampling.BICUBIC)


def test_hashes_do_not_depend_on_how_many_images_are_hashed_at_once(digits, monkeypatch):
    together = perceptual_hash(digits[:200])
    monkeypatch.setattr(perceptual, "_PIXELS", 7 * 64)
    np.testing.assert_array_equal(perceptual_hash(digits[:200]), together)

"""A hash that near-identical images share but for a few bits: how validation images that were inverted are found."""

from collections.abc import Iterator

import numpy as np

from streamaug.data.stored import Images

HASH_DTYPE = np.dtype("V32")

_SIDE = 16  # frequencies along each axis, so 256 bits; a smaller image has as many as pixels
_ZERO = 0.2  # grey levels: smaller coefficients are mostly rounding, compression and noise
_SHARE = 0.045  # of the bits: what two copies of one image may differ in
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_PIXELS = 1 << 22  # hashed at once, in float64
_BLOCK = 1 << 18  # hashes compared at once


def perceptual_hash(images: Images) -> np.ndarray:
    """uint8 [N, C, H, W] with 1 or 3 channels to 256 bits each, V32 [N].

    Which of the 16 × 16 lowest coefficients of the image's discrete cosine transform are positive (pHash, Zauner 2010,
    with a fixed threshold near 0 in place of the median). The bit of the mean, which is never negative, says instead
    whether the image changes more across than down. Nothing is resized first: a transform's low frequencies are those
    of the image at any size. An 8 × 8 image has 64 of them, and the other bits are 0.

    Measured at `default_distance`: share of images that have another one of the set so near, and share of altered
    copies that are (resized there and back by 1.37, JPEG of quality 75 at twice the size (digits: four times), noise of
    2 grey levels):

        set                                              distance   another   resized   JPEG    noise
        scikit-learn's digits, 8 × 8, 1,797 images       2          0.1%      60%       71%     97%
        1,000 of them at 32 × 32                         11         0.2%      100%      100%    100%
        Fashion-MNIST, 28 × 28, 700 images in 20,000     11         0         99.9%     99.7%   100%
        textures with class-wise shapes, 32 × 32, 500    11         0         100%      99.8%   99.8%
        the same at 64 × 64, 300                         11         0         100%      100%    100%

    Of all 600 million pairs of a Fashion-MNIST test image and a training image, 16 are so near: 14 differ by less than
    10 grey levels (root mean square), so they are copies indeed, and two by 18 and 29. With the usual 64 bits, 7% of
    the test images are within 2 bits of a training image, most of them unlike it. A mirrored, turned or much cropped
    copy is not found, nor one that was smaller than 16 × 16 in between.
    """
    down, across = (_cosines(size) for size in images.shape[2:])
    chunk = max(_PIXELS // (images.shape[2] * images.shape[3]), 1)
    hashes = [_hash(images[start : start + chunk], down, across) for start in range(0, len(images), chunk)]
    return np.concatenate(hashes) if hashes else np.empty(0, HASH_DTYPE)


def default_distance(height: int, width: int) -> int:
    """Bits in which two copies of an image of this size may differ.

    A check that stops a run must seldom be wrong: it is chosen for few false finds and not for finding every copy.
    """
    return int(_SHARE * min(height, _SIDE) * min(width, _SIDE))


def near_pairs(hashes: np.ndarray, others: np.ndarray, distance: int) -> Iterator[tuple[int, int, int]]:
    """Pairs (index into hashes, index into others, bits that differ) of two V32 arrays within `distance` bits."""
    words, other_words = (values.view(np.uint64).reshape(-1, HASH_DTYPE.itemsize // 8) for values in (hashes, others))
    for start in range(0, len(others), _BLOCK):
        block = other_words[start : start + _BLOCK]
        first = np.ascontiguousarray(block[:, 0])
        for index, value in enumerate(words):
            likely = np.flatnonzero(_count_bits(first ^ value[0]) <= distance)
            bits = _count_bits(block[likely] ^ value).sum(1)
            for near in np.flatnonzero(bits <= distance):
                yield index, start + int(likely[near]), int(bits[near])


def _hash(images: np.ndarray, down: np.ndarray, across: np.ndarray) -> np.ndarray:
    grey = images[:, 0].astype(np.float64)
    if images.shape[1] == 3:
        grey = _LUMA[0] * grey + _LUMA[1] * images[:, 1] + _LUMA[2] * images[:, 2]
    rows = (grey.reshape(-1, grey.shape[2]) @ across.T).reshape(len(grey), grey.shape[1], -1)  # [n, H, 16]
    coefficients = down @ rows  # [n, 16, 16], in grey levels
    bits = coefficients > _ZERO
    bits[:, 0, 0] = np.abs(coefficients[:, 0, 1]) > np.abs(coefficients[:, 1, 0]) + _ZERO
    return np.packbits(bits.reshape(len(images), -1), axis=1).view(HASH_DTYPE)[:, 0]


def _cosines(size: int) -> np.ndarray:
    """The lowest frequencies of the DCT-II, zeros where an image of this size has none: float64 [16, size]."""
    frequencies = np.arange(_SIDE)[:, None]
    return np.cos(np.pi * (2 * np.arange(size) + 1) * frequencies / (2 * size)) / size * (frequencies < size)


def _count_bits(values: np.ndarray) -> np.ndarray:
    """Bits set in each of an array of uint64."""
    values = values - ((values >> np.uint64(1)) & np.uint64(0x5555555555555555))
    pairs = np.uint64(0x3333333333333333)
    values = (values & pairs) + ((values >> np.uint64(2)) & pairs)
    values = (values + (values >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (values * np.uint64(0x0101010101010101)) >> np.uint64(56)

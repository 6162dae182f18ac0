"""Which images are held out: a share of every class, drawn so that it stays the same when the data are moved."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from streamaug.data.images import ImageSet
from streamaug.errors import DataError


def divide(images: ImageSet, amount: float, key: str, seed: int) -> tuple[ImageSet, ImageSet]:
    """`amount` images (a count, or a fraction below 1), drawn from each class by its size; and the rest.

    key: the setting that `amount` comes from, for messages. Raises DataError when a class would be empty on a side.
    """
    total, counts = len(images), images.class_counts()
    if amount >= 1 and amount != int(amount):
        raise DataError(f"data.{key}: {amount} is neither a count nor a fraction below 1")
    wanted = round(amount * total) if amount < 1 else int(amount)
    if amount == 0:
        return images.subset([]), images
    if counts.min() < 2:
        raise DataError(
            f"data.{key}: class '{images.class_names[counts.argmin()]}' has too few images to be divided; "
            f"add some, or set {key}: 0"
        )
    least, most = len(counts), total - len(counts)  # an image of every class on both sides
    if not least <= wanted <= most:
        raise DataError(
            f"data.{key}: {amount:g} means {wanted} of {total} images; with {len(counts)} classes it can be "
            f"{least} to {most}, a fraction such as 0.2 that amounts to as many, or 0 for none"
        )
    taken = np.zeros(total, dtype=bool)
    for label, quota in enumerate(_quotas(counts, wanted)):
        members = np.flatnonzero(images.labels == label)
        taken[sorted(members, key=lambda i: _rank(images.sources[i], seed))[:quota]] = True
    return images.subset(np.flatnonzero(taken)), images.subset(np.flatnonzero(~taken))


def without(images: ImageSet, hashes: Iterable[str], name: str, other: str, notes: list[str]) -> ImageSet:
    """The images whose pixels are not among `hashes`; what was dropped goes into `notes`.

    Raises DataError when a class loses all its images.
    """
    taken = set(hashes)
    kept = [i for i, digest in enumerate(images.hashes) if digest not in taken]
    if len(kept) == len(images):
        return images
    notes.append(f"{len(images) - len(kept)} {name} images dropped: the same pixels as {other} image")
    result = images.subset(kept)
    empty = np.flatnonzero(result.class_counts() == 0)
    if len(empty):
        raise DataError(
            f"every {name} image of class '{images.class_names[empty[0]]}' has the same pixels as {other} "
            "image: the two must hold different images"
        )
    return result


def _rank(source: str, seed: int) -> bytes:
    """A number that looks random, of the last two parts of an image's name."""
    name = "/".join(Path(source).parts[-2:])
    return hashlib.sha256(f"{seed}:{name}".encode("utf-8", "surrogateescape")).digest()


def _quotas(counts: np.ndarray, wanted: int) -> np.ndarray:
    """Integers that sum to `wanted`, in proportion to `counts`, each at least 1 and at most its count − 1."""
    quotas = np.clip(np.floor(counts * (wanted / counts.sum())).astype(np.int64), 1, counts - 1)
    while quotas.sum() != wanted:
        short = counts * (wanted / counts.sum()) - quotas
        if quotas.sum() < wanted:
            quotas[np.where(quotas < counts - 1, short, -np.inf).argmax()] += 1
        else:
            quotas[np.where(quotas > 1, short, np.inf).argmin()] -= 1
    return quotas

"""Images with labels, names and pixel hashes, and their division into three sets."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from streamaug.data.stored import Images, StoredImages, concatenate, select
from streamaug.errors import DataError

_SHOTS = 0x73686F7473  # separates the draw of labelled images from other users of the same seed


@dataclass(frozen=True, eq=False)
class ImageSet:
    """N labelled images.

    images: uint8 [N, C, H, W], in memory or, where there are too many, in a file; indexed they are arrays in memory.
    labels: int64 [N], indices into class_names; sources: where each came from (a file's path, or "digits/123"); hashes:
    sha256 of each image's pixels, in hexadecimal. Raises DataError when these do not fit together.
    """

    images: Images
    labels: np.ndarray
    class_names: list[str]
    sources: list[str]
    hashes: list[str]

    def __post_init__(self) -> None:
        if self.images.dtype != np.uint8 or self.images.ndim != 4:
            raise DataError(f"images are {self.images.dtype} {list(self.images.shape)}; expected uint8 [N, C, H, W]")
        if not len(self.images) == len(self.labels) == len(self.sources) == len(self.hashes):
            raise DataError(
                f"{len(self.images)} images, {len(self.labels)} labels, {len(self.sources)} sources, "
                f"{len(self.hashes)} hashes: expected as many of each"
            )
        outside = (self.labels < 0) | (self.labels >= len(self.class_names))
        if outside.any():
            at = int(np.flatnonzero(outside)[0])
            raise DataError(
                f"{self.sources[at]}: label {self.labels[at]} is outside the {len(self.class_names)} classes "
                f"(0 to {len(self.class_names) - 1})"
            )

    @classmethod
    def from_arrays(
        cls,
        images: Images,
        labels: np.ndarray | Sequence[int],
        class_names: Sequence[str],
        sources: Sequence[str] | None = None,
    ) -> "ImageSet":
        """A set from uint8 [N, C, H, W] pixels and their labels [N]; hashes are computed.

        sources: default "image/0", "image/1", ... Raises DataError when shapes, dtypes or labels do not fit.
        """
        images = images if isinstance(images, StoredImages) else np.ascontiguousarray(images)
        return cls(
            images=images,
            labels=np.asarray(labels, dtype=np.int64),
            class_names=list(class_names),
            sources=list(sources) if sources is not None else [f"image/{i}" for i in range(len(images))],
            hashes=[hashlib.sha256(images[i].tobytes()).hexdigest() for i in range(len(images))],
        )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def subset(self, indices: np.ndarray | Sequence[int]) -> "ImageSet":
        """The images at `indices`, in that order; all of them in their own order are not copied."""
        at = np.asarray(indices, dtype=np.int64)
        if len(at) == len(self) and np.array_equal(at, np.arange(len(self))):
            return self
        return ImageSet(
            images=select(self.images, at),
            labels=self.labels[at],
            class_names=self.class_names,
            sources=[self.sources[i] for i in at],
            hashes=[self.hashes[i] for i in at],
        )

    def select_shots(self, shots: int | None, seed: int) -> np.ndarray:
        """Indices (int64, ascending) of exactly `shots` images of every class; None gives all indices.

        The draw depends on `seed` alone, and a smaller `shots` draws a part of what a larger one does. Raises
        DataError when a class has fewer.
        """
        if shots is None:
            return np.arange(len(self), dtype=np.int64)
        key = np.array([seed & (2**64 - 1), _SHOTS], dtype=np.uint64)
        rng = np.random.Generator(np.random.Philox(key=key))
        chosen = []
        for label, name in enumerate(self.class_names):
            members = np.flatnonzero(self.labels == label)
            if len(members) < shots:
                least = self.class_counts().min()
                fewer = f"at most {least}, or null to use all" if least else "null"
                raise DataError(
                    f"class '{name}' has {len(members)} images to draw from, data.shots asks for {shots}: "
                    f"set data.shots to {fewer}"
                )
            chosen.append(rng.permutation(members)[:shots])
        return np.sort(np.concatenate(chosen))

    def class_counts(self) -> np.ndarray:
        """Images of each class: int64 [len(class_names)]."""
        return np.bincount(self.labels, minlength=len(self.class_names))


@dataclass(frozen=True, eq=False)
class Splits:
    """Three sets with no image in common, neither by position nor by pixels.

    notes: sentences about what was skipped or dropped on the way, for the log and the report.
    """

    train: ImageSet
    validation: ImageSet
    test: ImageSet
    notes: list[str] = field(default_factory=list)

    @property
    def unlabelled(self) -> ImageSet:
        """Train and validation images together: what a generator may learn from, without the labels."""
        both = (self.train, self.validation)
        return ImageSet(
            images=concatenate([part.images for part in both]),
            labels=np.concatenate([part.labels for part in both]),
            class_names=self.train.class_names,
            sources=[source for part in both for source in part.sources],
            hashes=[digest for part in both for digest in part.hashes],
        )

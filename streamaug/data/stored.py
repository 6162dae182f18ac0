"""Images that do not fit into memory: in a file that has no name, read as they are used."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class StoredImages:
    """uint8 images [N, C, H, W] in a memory-mapped file: an index reads what it names, as an array of its own.

    file: [M, C, H, W]; at: int64 [N], the places in it. Sets divided from one another share the file.
    """

    file: np.ndarray
    at: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.at), *self.file.shape[1:])

    @property
    def dtype(self) -> np.dtype:
        return self.file.dtype

    @property
    def ndim(self) -> int:
        return self.file.ndim

    def __len__(self) -> int:
        return len(self.at)

    def __getitem__(self, index: Any) -> np.ndarray:
        return np.array(self.file[self.at[index]])

    def select(self, indices: np.ndarray) -> "StoredImages":
        """The images at these indices, int64 [n], not copied."""
        return StoredImages(self.file, self.at[indices])


Images = np.ndarray | StoredImages


def select(images: Images, indices: np.ndarray) -> Images:
    """The images at these indices, int64 [n]; a copy where they are in memory."""
    return images.select(indices) if isinstance(images, StoredImages) else images[indices]


def concatenate(parts: Sequence[Images]) -> Images:
    """The images of all parts in turn; those in one file are not copied."""
    stored = [part for part in parts if isinstance(part, StoredImages)]
    if len(stored) == len(parts) and all(part.file is stored[0].file for part in stored):
        return StoredImages(stored[0].file, np.concatenate([part.at for part in stored]))
    return np.concatenate([part[:] for part in parts])


def make_room(shape: tuple[int, ...]) -> np.ndarray:
    """uint8 of this shape in a file of the folder for temporary files (TMPDIR), which goes with the last array of it.

    Raises OSError when the folder has no room.
    """
    with tempfile.TemporaryFile(prefix="streamaug-images-") as file:
        nbytes = int(np.prod(shape))
        file.truncate(nbytes)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, nbytes)  # a full disk says so now, not as a SIGBUS later
        return np.memmap(file, np.uint8, "r+", shape=shape)

"""MNIST's file format: all images of a set in one file, all labels in another, gzip-compressed or not."""

import gzip
import hashlib
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from streamaug.config import DataConfig
from streamaug.data.source import Source, few, no_such, visible
from streamaug.errors import DataError

_LAYOUT = (
    "expected train-images-idx3-ubyte and train-labels-idx1-ubyte, and t10k-... for the test set, "
    "each with or without .gz"
)
# Data sets that are recognised, by the sha256 of their training labels.
_CLASS_NAMES = {
    "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7": [  # Fashion-MNIST
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ],
}


def open_source(config: DataConfig) -> tuple[Source, Source | None]:
    """The train set of root; the t10k set of root, or of test_root (its train set if it has no other) is held out.

    Raises DataError on files that are missing, damaged, or do not belong together.
    """
    assert config.root is not None  # DataConfig sees to it
    source = _set(config.root, "train")
    if config.test_root is not None:
        return source, _set(config.test_root, "t10k" if _has(config.test_root, "t10k") else "train")
    return source, _set(config.root, "t10k") if _has(config.root, "t10k") else None


def _set(root: Path, name: str) -> Source:
    images_file, labels_file = _find(root, f"{name}-images", 3), _find(root, f"{name}-labels", 1)
    images, labels = _read(images_file, 3), _read(labels_file, 1)  # [N, H, W], [N]
    if len(images) != len(labels):
        raise DataError(f"{images_file} has {len(images)} images, {labels_file.name} {len(labels)} labels")
    return Source(
        where=str(root),
        names=[f"{root}/{name}/{i}" for i in range(len(images))],
        fetch=lambda i: (Image.fromarray(images[i]), int(labels[i])),
        class_names=_CLASS_NAMES.get(hashlib.sha256(labels.tobytes()).hexdigest()),
    )


def _has(root: Path, name: str) -> bool:
    return root.is_dir() and any(path.name.startswith(f"{name}-") for path in visible(root))


def _find(root: Path, name: str, dims: int) -> Path:
    """The file of that name; some programs write a dot for its last hyphen but one."""
    if not root.exists():
        raise no_such(root, _LAYOUT)
    if not root.is_dir():
        raise DataError(f"{root}: a file; {_LAYOUT}")
    for separator in "-.":
        for suffix in ("", ".gz"):
            path = root / f"{name}{separator}idx{dims}-ubyte{suffix}"
            if path.is_file():
                return path
    found = few(path.name for path in visible(root)) or "nothing"
    raise DataError(f"{root}: no {name}-idx{dims}-ubyte (found {found}); {_LAYOUT}")


def _read(path: Path, dims: int) -> np.ndarray:
    """The uint8 array of an idx file: two zero bytes, the type, the number of axes, their lengths, the values."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    if data[:4] != bytes((0, 0, 8, dims)) or len(data) < 4 + 4 * dims:
        raise DataError(
            f"{path}: begins with {data[:4].hex() or 'nothing'}; "
            f"an idx file of unsigned bytes with {dims} axes begins with 000008{dims:02x}"
        )
    shape = np.frombuffer(data, ">u4", dims, offset=4).astype(np.int64)
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * dims)
    if values.size != shape.prod() or not shape.all():
        raise DataError(
            f"{path}: {' x '.join(str(n) for n in shape)} bytes are announced, {values.size} are there; "
            "the file is empty, cut off, or damaged"
        )
    return values.reshape(shape)

"""Where real images come from (scikit-learn's digits, a folder per class) and how they are split."""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from streamaug.config import DataConfig
from streamaug.data.decode import EXTENSIONS, Unreadable, read_image, resize, to_chw
from streamaug.data.images import ImageSet, Splits
from streamaug.errors import DataError, MissingExtra, nearest

_LISTED = 20  # names of a list that go into a message
_LAYOUT = "expected one folder of images per class, such as root/cat/001.png and root/dog/001.png"


def load_splits(config: DataConfig, seed: int = 0) -> Splits:
    """Load the images a configuration names and divide them into train, validation and test.

    Every class is in every set that is not empty, in proportion. Where an image goes is decided by its
    class, its name and `seed`, so it does not move when the folder does, when `image_size` changes, or (but
    for a few) when images are added. Leave `seed` alone: all runs then hold out the same images, whatever
    their own seed. With `test_root`, all its images are the test set and `holdout` is not used.

    A train or validation image whose pixels occur in the test set is dropped, as is a train image whose
    pixels occur in the validation set; `Splits.notes` counts them and names the files that were skipped.
    Raises DataError on a folder, class, file or share that cannot be used, MissingExtra when scikit-learn is
    needed and missing.
    """
    bad = _BadFiles(config.max_bad)
    test = None
    if config.source == "digits":
        rest = _digits(config)
    else:
        assert config.root is not None  # DataConfig sees to it
        rest = _read_folder(config.root, config, bad)
        if config.test_root is not None:
            test = _read_folder(config.test_root, config, bad, rest.class_names)
    if test is None:
        test, rest = _divide(rest, config.holdout, "holdout", seed)
    validation, train = _divide(rest, config.validation, "validation", seed)

    notes = [f"skipped {path}: {reason}" for path, reason in bad.files]
    validation = _without(validation, test.hashes, "validation", "a test", notes)
    train = _without(train, test.hashes, "train", "a test", notes)
    train = _without(train, validation.hashes, "train", "a validation", notes)
    repeated = len(train) - len(set(train.hashes))
    if repeated:
        notes.append(f"{repeated} train images repeat the pixels of another train image (kept)")
    contradicting = len(set(zip(train.hashes, train.labels.tolist(), strict=True))) - len(set(train.hashes))
    if contradicting:
        notes.append(f"{contradicting} train images have the pixels of an image of another class (kept)")
    return Splits(train, validation, test, notes)


def _digits(config: DataConfig) -> ImageSet:
    """scikit-learn's 1,797 handwritten digits, 8 × 8, values 0..16 scaled to 0..255."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingExtra("scikit-learn", "demo") from None
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[:, None]  # [1797, 1, 8, 8]
    size = config.image_size
    if size != 8:
        images = np.stack([to_chw(resize(Image.fromarray(image[0]), size, config.fit)) for image in images])
    return ImageSet.from_arrays(
        images=np.repeat(images, config.channels, axis=1),
        labels=digits.target,
        class_names=[str(name) for name in digits.target_names],
        sources=[f"digits/{i}" for i in range(len(images))],
    )


def _read_folder(root: Path, config: DataConfig, bad: "_BadFiles", class_names: list[str] | None = None) -> ImageSet:
    """Read root/<class>/<image> in sorted order. class_names: the classes that must be there, if known."""
    files = _list_classes(root)
    if class_names is not None:
        _same_classes(root, list(files), class_names)
    names = class_names or list(files)
    label_of = {name: label for label, name in enumerate(names)}
    paths = [(path, label_of[name]) for name, members in files.items() for path in members]

    def read(path: Path) -> np.ndarray | Unreadable:
        try:
            return read_image(path, config.image_size, config.channels, config.fit)
        except Unreadable as error:
            return error

    images, labels, sources = [], [], []
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        try:
            for (path, label), image in zip(paths, pool.map(read, [path for path, _ in paths]), strict=True):
                if isinstance(image, Unreadable):
                    bad.add(path, image)
                    continue
                images.append(image)
                labels.append(label)
                sources.append(str(path))
        finally:
            pool.shutdown(cancel_futures=True)
    missing = sorted(set(names) - {names[label] for label in labels})
    if missing:
        raise DataError(f"{root}: no readable image of class '{missing[0]}':\n{bad.listing()}")
    return ImageSet.from_arrays(np.stack(images), labels, names, sources)


def _list_classes(root: Path) -> dict[str, list[Path]]:
    """The image files of each class folder, sorted; names that begin with a dot are left out."""
    if not root.exists():
        siblings = os.listdir(root.parent) if os.access(root.parent, os.R_OK) else []
        raise DataError(f"{root}: no such folder{nearest(root.name, siblings)}; {_LAYOUT}")
    if not root.is_dir():
        raise DataError(f"{root}: a file; {_LAYOUT}")
    entries = _visible(root)
    folders = [entry for entry in entries if entry.is_dir()]
    if not folders:
        found = f"holds {_few([entry.name for entry in entries])} and no folder" if entries else "is empty"
        raise DataError(f"{root}: {found}; {_LAYOUT}")
    classes = {}
    for folder in folders:
        inside = _visible(folder)
        classes[folder.name] = [path for path in inside if path.suffix.lower() in EXTENSIONS and not path.is_dir()]
        if not classes[folder.name]:
            found = _few([path.name for path in inside]) if inside else "nothing"
            raise DataError(
                f"{folder}: class '{folder.name}' has no image (found {found}); "
                f"accepted: {', '.join(sorted(EXTENSIONS))}, directly in the class's folder"
            )
    return classes


def _visible(folder: Path) -> list[Path]:
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}") from None


def _same_classes(root: Path, found: list[str], expected: list[str]) -> None:
    unknown = [name for name in found if name not in expected]
    missing = [name for name in expected if name not in found]
    if unknown:
        hint = nearest(unknown[0], expected)
        raise DataError(f"{root}: class '{unknown[0]}' is not among data.root's{hint}: {_few(expected)}")
    if missing:
        raise DataError(f"{root}: no folder for class '{missing[0]}'; data.root has {_few(expected)}")


def _divide(images: ImageSet, amount: float, key: str, seed: int) -> tuple[ImageSet, ImageSet]:
    """`amount` images (a count, or a fraction below 1), drawn from each class by its size; and the rest."""
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


def _rank(source: str, seed: int) -> bytes:
    """A number that looks random, of an image's class folder and name."""
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


def _without(images: ImageSet, hashes: Iterable[str], name: str, other: str, notes: list[str]) -> ImageSet:
    """The images whose pixels are not among `hashes`; what was dropped goes into `notes`."""
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


class _BadFiles:
    """Files that gave no image, tolerated up to a limit."""

    def __init__(self, limit: int):
        self.limit = limit
        self.files: list[tuple[Path, Unreadable]] = []

    def add(self, path: Path, reason: Unreadable) -> None:
        self.files.append((path, reason))
        if len(self.files) > self.limit:
            raise DataError(
                f"more than data.max_bad = {self.limit} unreadable image files; remove them or raise "
                f"data.max_bad:\n{self.listing()}"
            )

    def listing(self) -> str:
        return "\n".join(f"  {path}: {reason}" for path, reason in self.files)


def _few(names: list[str]) -> str:
    shown = ", ".join(names[:_LISTED])
    return f"{shown} and {len(names) - _LISTED} more" if len(names) > _LISTED else shown

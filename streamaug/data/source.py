"""What every source of images has in common: how it is described, read into memory, and what its classes are called."""

import logging
import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from streamaug.config import DataConfig
from streamaug.data.decode import Unreadable, read_image
from streamaug.data.images import ImageSet
from streamaug.data.stored import StoredImages, make_room
from streamaug.errors import DataError, nearest

log = logging.getLogger("streamaug")

Undecoded = Path | bytes | Image.Image

_LISTED = 20  # names of a list that go into a message
_CHUNK = 256  # images fetched before they are decoded together


@dataclass(frozen=True, eq=False)
class Source:
    """N labelled images that have not been read yet.

    where: how messages name the source. names: what each image is called, N strings whose last two parts stay the same
    when the data are moved. fetch: image i, undecoded, and its label; it is called in the main thread and raises
    Unreadable for a damaged image, DataError for what can never be used. class_names: of labels 0, 1, ...; None where
    the data have only numbers. numbered: whether labels are numbers in the data; if not they are names, and the order
    of class_names is ours. in_files: images are worth decoding in threads. broken: name and reason of images that were
    found to be damaged before any was fetched. notes: sentences for the log.
    """

    where: str
    names: Sequence[str]
    fetch: Callable[[int], tuple[Undecoded, int]]
    class_names: list[str] | None = None
    numbered: bool = True
    in_files: bool = False
    broken: Sequence[tuple[str, Unreadable]] = ()
    notes: Sequence[str] = ()


class BadFiles:
    """Images that could not be read, tolerated up to a limit."""

    def __init__(self, limit: int):
        self.limit = limit
        self.files: list[tuple[str, Unreadable]] = []

    def add(self, name: str, reason: Unreadable) -> None:
        """Raises DataError, with the list, beyond the limit."""
        self.files.append((name, reason))
        if len(self.files) > self.limit:
            raise DataError(
                f"more than data.max_bad = {self.limit} unreadable image files; remove them or raise "
                f"data.max_bad:\n{self.listing()}"
            )

    def listing(self) -> str:
        return "\n".join(f"  {name}: {reason}" for name, reason in self.files)

    def notes(self) -> list[str]:
        return [f"skipped {name}: {reason}" for name, reason in self.files]


@dataclass(frozen=True)
class Classes:
    """What classes are called, and which of them each label of the data is (None: the same number)."""

    names: list[str] | None
    positions: list[int] | None = None

    @classmethod
    def of(cls, source: Source, given: list[str] | None) -> "Classes":
        """The source's own classes, called and ordered as `data.class_names` says.

        Numbered classes are named by it, number by number; named ones are put into its order. Raises DataError.
        """
        own = source.class_names
        if given is None or own is None:
            names, positions = given or own, None
        elif not source.numbered:
            same_names(source.where, own, given, "data.class_names")
            names, positions = given, _positions(own, given)
        else:
            if len(given) != len(own):
                raise DataError(
                    f"data.class_names: {len(given)} names, but {source.where} has {len(own)} classes: {few(own)}"
                )
            if given != own and sorted(given) == sorted(own):
                raise DataError(
                    f"data.class_names: the names of {source.where} in another order, which would call classes by "
                    f"each other's names; its labels 0, 1, ... are {few(own)}"
                )
            names, positions = given, None
        repeated = [name for name, count in Counter(names or ()).items() if count > 1]
        if repeated:
            raise DataError(
                f"{source.where}: two classes are called '{repeated[0]}'; "
                "give data.class_names a different name for each"
            )
        return cls(names, positions)

    def held_out(self, source: Source, test: Source) -> "Classes":
        """The same for the held-out images of `source`, matched by name where both sides have names."""
        if source.numbered != test.numbered:
            kinds = [("names", "numbers")[side.numbered] for side in (test, source)]
            raise DataError(f"{test.where}: labels are {kinds[0]}, those of {source.where} are {kinds[1]}")
        if source.class_names is None or test.class_names is None:
            return Classes(self.names)
        own = source.class_names
        same_names(test.where, test.class_names, own, source.where)
        positions = _positions(test.class_names, own)
        if self.positions is not None:
            positions = [self.positions[position] for position in positions]
        return Classes(self.names, positions)


def same_names(where: str, found: list[str], expected: list[str], owner: str) -> None:
    """Raises DataError when the two are not the same names in some order; `owner` has the expected ones."""
    unknown = sorted(set(found) - set(expected))
    missing = sorted(set(expected) - set(found))
    if unknown:
        hint = nearest(unknown[0], expected)
        raise DataError(f"{where}: class '{unknown[0]}' is not among those of {owner}{hint}: {few(expected)}")
    if missing:
        raise DataError(f"{where}: no class '{missing[0]}'; {owner} has {few(expected)}")


def _positions(names: list[str], among: list[str]) -> list[int]:
    position = {name: i for i, name in enumerate(among)}
    return [position[name] for name in names]


def read(source: Source, classes: Classes, config: DataConfig, bad: BadFiles) -> ImageSet:
    """Decode all images, in the source's order; unreadable ones are added to `bad` and left out.

    They are kept in memory, or in a temporary file where memory has no room for them. Raises DataError when there is no
    image, when there is no room for them anywhere (said before the first is read), and as
    `Source.fetch`, `BadFiles.add` and ImageSet do.
    """
    for name, reason in source.broken:
        bad.add(name, reason)
    count = len(source.names)
    shape = (config.channels, config.image_size, config.image_size)

    def fetch(i: int) -> tuple[Undecoded | Unreadable, int]:
        try:
            return source.fetch(i)
        except Unreadable as error:
            return error, 0

    def decode(image: Undecoded | Unreadable) -> np.ndarray | Unreadable:
        if isinstance(image, Unreadable):
            return image
        try:
            return read_image(image, config.image_size, config.channels, config.fit)
        except Unreadable as error:
            return error

    images = _room_for(source.where, (count, *shape))
    labels: list[int] = []
    names: list[str] = []
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        apply = pool.map if source.in_files else map
        for start in range(0, count, _CHUNK):
            chunk = range(start, min(start + _CHUNK, count))
            fetched = [fetch(i) for i in chunk]
            for i, (_, label), pixels in zip(
                chunk, fetched, apply(decode, [image for image, _ in fetched]), strict=True
            ):
                if isinstance(pixels, Unreadable):
                    bad.add(source.names[i], pixels)
                    continue
                images[len(names)] = pixels
                labels.append(label)
                names.append(source.names[i])
    if not names:
        raise DataError(f"{source.where}: no image" + (f" could be read:\n{bad.listing()}" if bad.files else ""))
    if classes.positions is not None:
        # A label outside the classes stays what it is, for ImageSet to refuse.
        labels = [classes.positions[label] if 0 <= label < len(classes.positions) else label for label in labels]
    called = classes.names or [str(number) for number in range(max(labels) + 1)]
    read_in = np.arange(len(names))
    kept = StoredImages(images, read_in) if isinstance(images, np.memmap) else images[: len(names)]
    return ImageSet.from_arrays(kept, labels, called, names)


def _room_for(where: str, shape: tuple[int, ...]) -> np.ndarray:
    """An array uint8 [N, C, H, W] in memory; a memory-mapped one where that would take more than half of what is free.

    Raises DataError when there is no room for either.
    """
    free, nbytes = _free_bytes(), math.prod(shape)
    if free is None or 2 * nbytes <= free:  # dividing them into sets copies them once
        return np.empty(shape, np.uint8)
    folder = tempfile.gettempdir()
    told = f"{where}: {shape[0]} images of {math.prod(shape[1:])} bytes each take {_size(nbytes)}"
    try:
        room = make_room(shape)
    except OSError as error:
        raise DataError(
            f"{told}; {_size(free)} of memory are free, and {folder} has no room either ({error.strerror}): set TMPDIR "
            "to a folder that has, lower data.image_size, or take a part of the images"
        ) from None
    log.info("%s, and %s of memory are free: they are kept in a file under %s (TMPDIR)", told, _size(free), folder)
    return room


def _free_bytes() -> int | None:
    """Memory that can be had without swapping; None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def few(names: Iterable[str]) -> str:
    """A list for a message: its first names, and how many more there are."""
    names = list(names)
    shown = ", ".join(names[:_LISTED])
    return f"{shown} and {len(names) - _LISTED} more" if len(names) > _LISTED else shown


def no_such(root: Path, layout: str) -> DataError:
    """The error for a data.root that is not there, with the nearest one that is; `layout` says what is expected."""
    siblings = os.listdir(root.parent) if os.access(root.parent, os.R_OK) and root.parent.is_dir() else []
    return DataError(f"data.root {root}: no such folder{nearest(root.name, siblings)}; {layout}")


def visible(folder: Path) -> list[Path]:
    """What a folder holds, sorted; names that begin with a dot are left out. Raises DataError."""
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}") from None

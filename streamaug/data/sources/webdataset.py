"""WebDataset's tar shards: files of one basename make a sample, one of them the image, another its label."""

import json
import os
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamaug.config import DataConfig
from streamaug.data.decode import EXTENSIONS, Unreadable
from streamaug.data.source import Source, few, no_such, visible
from streamaug.errors import DataError

_LAYOUT = "expected a .tar shard or a folder of them"
_LABEL_FILES = ("cls", "json")


def open_source(config: DataConfig) -> tuple[Source, Source | None]:
    """All shards of root in sorted order, and those of test_root. Raises DataError."""
    assert config.root is not None  # DataConfig sees to it
    return _shards(config.root, config), None if config.test_root is None else _shards(config.test_root, config)


@dataclass
class _Sample:
    """Files of one basename: where the images lie in the shard, and the contents of what may be the label."""

    images: dict[str, tuple[int, int]] = field(default_factory=dict)  # extension: offset, bytes
    texts: dict[str, bytes] = field(default_factory=dict)


def _shards(root: Path, config: DataConfig) -> Source:
    names: list[str] = []
    places: list[tuple[Path, int, int]] = []
    labels: list[int | str] = []
    broken: list[tuple[str, Unreadable]] = []
    for shard in _list(root):
        samples, damage = _index(shard, config.label_key)
        if damage is not None:
            broken.append((str(shard), damage))
        for key, sample in samples.items():
            name = f"{shard}/{key}"
            try:
                label = _label(key, sample.texts, config.label_key)
                places.append((shard, *_pick(name, sample.images, config.image_key)))
            except Unreadable as reason:
                broken.append((name, reason))
                continue
            names.append(name)
            labels.append(label)
    numbered = all(isinstance(label, int) for label in labels)
    class_names = None if numbered else sorted({str(label) for label in labels})
    position = {name: i for i, name in enumerate(class_names or ())}

    def fetch(i: int) -> tuple[bytes, int]:
        shard, offset, size = places[i]
        try:
            with open(shard, "rb") as file:
                data = os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise Unreadable(f"cannot be read: {error.strerror}") from None
        if len(data) < size:
            raise Unreadable(f"cut off: {len(data)} of {size} bytes are there")
        label = labels[i]
        return data, label if numbered and isinstance(label, int) else position[str(label)]

    return Source(
        where=str(root),
        names=names,
        fetch=fetch,
        class_names=class_names,
        numbered=numbered,
        in_files=True,
        broken=broken,
    )


def _list(root: Path) -> list[Path]:
    if not root.exists():
        raise no_such(root, _LAYOUT)
    if not root.is_dir():
        return [root]
    entries = visible(root)
    shards = [path for path in entries if path.suffix.lower() == ".tar" and path.is_file()]
    if not shards:
        found = few(path.name for path in entries) or "nothing"
        raise DataError(f"{root}: no .tar in it (found {found}); {_LAYOUT}, not compressed")
    return shards


def _index(shard: Path, label_key: str | None) -> tuple[dict[str, _Sample], Unreadable | None]:
    """The samples of a shard by basename, in order, and what is wrong with the shard."""
    samples: dict[str, _Sample] = {}
    members = 0
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                members += 1
                key, extension = _split(member.name)
                if not member.isreg() or not extension:
                    continue
                if f".{extension.rpartition('.')[2]}" in EXTENSIONS:
                    samples.setdefault(key, _Sample()).images[extension] = (member.offset_data, member.size)
                elif extension in _LABEL_FILES or extension == label_key:
                    file = tar.extractfile(member)
                    assert file is not None  # it is a regular file
                    samples.setdefault(key, _Sample()).texts[extension] = file.read()
            end = tar.offset
        # At a damaged header tarfile stops without a word, as if the archive ended there.
        with open(shard, "rb") as file:
            if os.pread(file.fileno(), tarfile.BLOCKSIZE, end).strip(b"\0"):
                raise tarfile.ReadError("a damaged header")
    except (tarfile.TarError, OSError, EOFError) as error:
        if members == 0:
            return {}, Unreadable(f"not an uncompressed tar file: {error}")
        return samples, Unreadable(f"damaged after {members} files: {error}; what follows is missing")
    return samples, None


def _split(member: str) -> tuple[str, str]:
    """ "n01/cat.seg.png" is file "seg.png" of sample "n01/cat"; hidden files have no extension here."""
    folder, _, name = os.path.normpath(member).rpartition("/")
    stem, _, extension = name.partition(".")
    if not stem:
        return member, ""
    return f"{folder}/{stem}" if folder else stem, extension.lower()


def _pick(name: str, images: dict[str, tuple[int, int]], image_key: str | None) -> tuple[int, int]:
    """Offset and bytes of the sample's image."""
    if image_key is not None:
        if image_key.lower() not in images:
            raise Unreadable(f"no .{image_key} in this sample (images: {few(images) or 'none'})")
        return images[image_key.lower()]
    if not images:
        raise Unreadable("no image in this sample")
    if len(images) > 1:
        raise DataError(f"{name}: several images ({few(images)}); name the extension of one with data.image_key")
    return next(iter(images.values()))


def _label(key: str, texts: dict[str, bytes], label_key: str | None) -> int | str:
    """The number or name in .cls, in .json, or of the folder the sample is in."""
    if label_key is not None and label_key in texts:
        return _parse(texts[label_key])
    if label_key is None and "cls" in texts:
        return _parse(texts["cls"])
    if "json" in texts:
        values = _json(texts["json"])
        field_name = label_key or "label"
        if field_name not in values:
            raise Unreadable(f"its .json has no '{field_name}' (it has {few(values)}); data.label_key names the field")
        value = values[field_name]
        if not isinstance(value, int | str):
            raise Unreadable(f"'{field_name}' in its .json is {value!r}; expected a number or a name")
        return value
    folder = key.rpartition("/")[0].rpartition("/")[2]
    if label_key is not None or not folder:
        wanted = f"neither .{label_key} nor .json" if label_key else "no .cls, no .json, and in no folder of its class"
        raise Unreadable(f"no label: {wanted}")
    return folder


def _parse(text: bytes) -> int | str:
    value = text.decode("utf-8", "replace").strip()
    if not value:
        raise Unreadable("its label file is empty")
    try:
        return int(value)
    except ValueError:
        return value


def _json(text: bytes) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise Unreadable(f"its .json cannot be parsed: {error}") from None
    if not isinstance(values, dict):
        raise Unreadable("its .json holds no object with fields")
    return values

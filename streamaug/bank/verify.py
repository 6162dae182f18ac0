"""Is a bank what was written? Every checksum, every number, and whether images to be judged by were inverted."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from streamaug.bank.edit import Selection, locked, write_selections
from streamaug.bank.files import load_shard, read_index, sha256_of
from streamaug.bank.reader import LatentBank, name_of, not_finite_rows, open_file
from streamaug.data.decode import EXTENSIONS, Fit, Unreadable, read_image
from streamaug.data.perceptual import default_distance, near_pairs, perceptual_hash
from streamaug.errors import BankError, DataError


@dataclass(frozen=True, eq=False)
class Verification:
    """What `verify` found.

    problems: a sentence for each file that has changed and each row that is not finite; damaged: bool [R], the rows
    that are in such a file or not finite; names: their source names.
    """

    problems: list[str]
    damaged: np.ndarray
    names: list[str]


@dataclass(frozen=True)
class Leak:
    """An image that was inverted. bits: in which the perceptual hashes differ; None when the pixels are the same."""

    file: Path
    row: int
    name: str
    bits: int | None


@dataclass(frozen=True)
class Comparison:
    """A folder's images against a bank's sources.

    images: how many were read; unreadable: files that could not be, with reasons; leaks: sorted by file and row;
    perceptual: whether near-duplicates could be looked for, or only exact ones.
    """

    images: int
    unreadable: list[str]
    leaks: list[Leak]
    perceptual: bool


def verify(path: Path) -> Verification:
    """Read every byte of a bank. It need not open: a truncated shard is a problem like others.

    Raises BankError when the index or the rows file is damaged: without them no row has a name.
    """
    index = read_index(path)
    problem = _file_problem(path / index["rows"]["file"], index["rows"])
    if problem:
        raise BankError(f"{problem}; run `streamaug invert` again: what its shards hold is kept")
    rows = open_file(path, index["rows"])
    problems: list[str] = []
    damaged = np.zeros(index["num_rows"], dtype=bool)
    for part in index["parts"]:
        start = 0
        for entry in part["shards"]:
            file, stop = path / entry["file"], start + entry["rows"]
            problem = _file_problem(file, entry)
            if problem:
                problems.append(f"{problem} (rows {start} to {stop - 1}, part '{part['name']}')")
                damaged[start:stop] = True
            for name, tensor in _tensors(file):
                for row in not_finite_rows(tensor):
                    problems.append(f"row {start + row} ({name_of(rows, start + row)}): '{name}' is not finite")
                    damaged[start + row] = True
            start = stop
    return Verification(problems, damaged, [name_of(rows, row) for row in np.flatnonzero(damaged).tolist()])


def repair(path: Path) -> Verification:
    """Drop the rows that `verify` finds damaged, so that the bank opens again; what was found.

    Raises BankError when no row would be left, the folder is being written, or the index or rows file is damaged.
    """
    read_index(path)  # nothing is locked, and so made, in a folder that is no bank
    with locked(path):
        found = verify(path)
        if found.damaged.all() and found.problems:
            raise BankError(
                f"{path}: no row would be left; run `streamaug invert` again: what is sound is kept, the rest is redone"
            )
        if found.damaged.any():
            index = read_index(path)
            edit = f"{int(found.damaged.sum())} of {len(found.damaged)} rows dropped by repair"
            selection = Selection(path, index, open_file(path, index["rows"]), ~found.damaged)
            write_selections(path, [selection], edit)
    return found


def compare(bank: LatentBank, folder: Path, distance: int | None = None, fit: Fit | None = None) -> Comparison:
    """Which images of a folder, at any depth, the bank was made from: the same pixels, or nearly.

    Files are read at the bank's image shape. distance: bits of the perceptual hash in which
    near-duplicates may differ; None takes `default_distance`. fit: as in the configuration; None takes what the bank
    records, else "crop". Raises DataError when the folder is
    missing or has no readable image, BankError when the bank's images are not square.
    """
    channels, height, width = bank.image_shape
    if height != width:
        raise BankError(f"{bank.path}: its images are {height} × {width}; only square images can be compared")
    fit = fit or bank.meta.get("fit", "crop")
    files, unreadable, hashes, perceptual = [], [], [], []

    def read(file: Path) -> tuple[str, np.ndarray] | Unreadable:
        try:
            image = read_image(file, height, channels, fit)
        except Unreadable as error:
            return error
        return hashlib.sha256(image.tobytes()).hexdigest(), perceptual_hash(image[None])

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        found = _images_below(folder)
        for file, result in zip(found, pool.map(read, found), strict=True):
            if isinstance(result, Unreadable):
                unreadable.append(f"{file}: {result}")
                continue
            files.append(file)
            hashes.append(result[0])
            perceptual.append(result[1])
    if not files:
        reasons = "".join(f"\n  {line}" for line in unreadable[:10])
        raise DataError(f"{folder}: no readable image in it or below; nothing was compared{reasons}")
    bits_of: dict[tuple[int, int], int | None] = {}  # (index into files, row) of each leak
    stored = bank.perceptual_hashes
    if stored is not None:
        within = default_distance(height, width) if distance is None else distance
        pairs = near_pairs(np.concatenate(perceptual), stored, within)
        bits_of.update(((at, row), bits) for at, row, bits in pairs)
    bits_of.update(dict.fromkeys(_same(bank, hashes)))
    leaks = [Leak(files[at], row, bank.source_name(row), bits_of[at, row]) for at, row in sorted(bits_of)]
    return Comparison(len(files), unreadable, leaks, stored is not None)


def _same(bank: LatentBank, hashes: list[str]) -> Iterator[tuple[int, int]]:
    """Pairs (index into hashes, row) of equal pixels."""
    indices: dict[str, list[int]] = {}
    for at, digest in enumerate(hashes):
        indices.setdefault(digest, []).append(at)
    for row in bank.rows_with(hashes).tolist():
        for at in indices[bank.source_hash(row)]:
            yield at, row


def _images_below(folder: Path) -> list[Path]:
    """Image files of a folder and of the folders in it, sorted; hidden ones are left out."""
    if not folder.is_dir():
        raise DataError(f"{folder}: {'a file' if folder.exists() else 'no such folder'}; expected a folder of images")
    return sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in EXTENSIONS
        and not any(name.startswith(".") for name in file.relative_to(folder).parts)
        and not file.is_dir()
    )


def _file_problem(file: Path, entry: dict[str, Any]) -> str | None:
    """What is wrong with a file that the index names, or None."""
    try:
        size = file.stat().st_size
        if size != entry["bytes"]:
            return f"{file}: {size} bytes of {entry['bytes']} are there"
        if sha256_of(file) != entry["sha256"]:
            return f"{file}: its bytes are not those that were written"
    except FileNotFoundError:
        return f"{file}: missing"
    except OSError as error:
        return f"{file}: cannot be read: {error.strerror}"
    return None


def _tensors(file: Path) -> list[tuple[str, torch.Tensor]]:
    """A shard's tensors, or none when it cannot be loaded."""
    try:
        return list(load_shard(file).items())
    except (OSError, SafetensorError):
        return []

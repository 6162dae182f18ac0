"""Banks made from banks: without some of their rows, or several put together; nothing is computed again."""

import hashlib
import logging
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load

from streamaug.bank.files import (
    FORMAT,
    INDEX,
    VERSION,
    WORK,
    data_files,
    file_entries,
    file_entry,
    groups_in,
    refuse_foreign,
    seal,
    shard_bytes,
    write_atomically,
)
from streamaug.bank.lock import lock
from streamaug.bank.plan import hash_of, rows_fingerprint
from streamaug.bank.reader import Groups, LatentBank
from streamaug.errors import BankError, MismatchError, UsageError, nearest

_log = logging.getLogger("streamaug")

SCORE = "score"  # the part that `bank.score` adds
_CONDITION = re.compile(r"\s*([\w.]+)\s*(<=|>=|<|>)\s*(\S+)\s*")
_COMPARE = {"<": np.less, "<=": np.less_equal, ">": np.greater, ">=": np.greater_equal}
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Dropped:
    """What `drop` did. by_class: rows dropped of each class; left: rows kept; unmatched: lines of the list in vain."""

    by_class: dict[str, int]
    left: int
    unmatched: int

    @property
    def rows(self) -> int:
        return sum(self.by_class.values())


@dataclass(frozen=True)
class Merged:
    """What `merge` did. rows: in the new bank; duplicates: rows that were left out."""

    rows: int
    duplicates: int


@dataclass(frozen=True, eq=False)
class Selection:
    """Rows of a bank that go into another one.

    index, rows: its index and the tensors of its rows file; keep: bool [R]; numbers: int64 [classes], what each class
    is numbered there, or None for the same.
    """

    folder: Path
    index: dict[str, Any]
    rows: Mapping[str, torch.Tensor]
    keep: np.ndarray
    numbers: np.ndarray | None = None


def drop(
    path: Path,
    out: Path | None = None,
    *,
    classes: Sequence[str] = (),
    hashes: Path | None = None,
    quality: str | None = None,
) -> Dropped:
    """Write the bank without the rows that one of the conditions names; without `out` in place of the bank itself.

    classes: class names; hashes: a text file with a source hash or a source name on each line; quality: a row array
    compared with a number, "ddim.error>0.1". In place, the old bank stays whole until the new index replaces its own.
    Raises BankError for an unknown class or row array, a list of which nothing is in the bank, when no row would be
    left, and as the writer does; UsageError when no condition is given or one cannot be read.
    """
    if not classes and hashes is None and quality is None:
        raise UsageError("nothing says which rows to drop: give --class, --hashes or --quality")
    if out is not None:
        refuse_occupied(out)
    bank = LatentBank.open(path)
    if bank.num_rows == 0:
        raise BankError(f"{path}: the bank has no rows to drop")
    _refuse_all(bank, _unwanted(bank, classes, hashes, quality)[0])
    with locked(out or path):
        if out is None:
            bank = LatentBank.open(path)  # another process may have written it before the lock was ours
        return _drop(bank, out or path, classes, hashes, quality)


def merge(paths: Sequence[Path], out: Path) -> Merged:
    """Write one bank of the rows of several; of rows with the same source hash and class the first is kept.

    Classes are matched by name and numbered as in the first bank. Scores by different judges are left out, and the log
    says so. Groups stay those that the rows were computed in.
    Raises MismatchError, naming both values, for banks of different models, methods, settings, dtypes, image shapes
    or classes; BankError when one cannot be opened or `out` cannot be written.
    """
    if len(paths) < 2:
        raise UsageError("merge needs two banks or more")
    banks = [LatentBank.open(path) for path in paths]
    if any(bank.parts.get(SCORE) != banks[0].parts.get(SCORE) for bank in banks):
        _log.warning("the rows were scored by different judges, or not all: the merged bank has no scores")
        for bank in banks:
            bank.index = bank.index | {"parts": [part for part in bank.index["parts"] if part["name"] != SCORE]}
    for bank in banks[1:]:
        _refuse_unlike(banks[0], bank)
    refuse_occupied(out)
    order = {name: number for number, name in enumerate(banks[0].class_names)}
    numbers = [np.array([order[name] for name in bank.class_names], dtype=np.int64) for bank in banks]
    keys = [
        np.concatenate(
            [bank.rows["source_hash"].numpy(), number[bank.labels][:, None].view(np.uint8)], axis=1
        )  # [R, 32 + 8]
        for bank, number in zip(banks, numbers, strict=True)
    ]
    items = np.concatenate(keys).view(f"V{keys[0].shape[1]}")[:, 0]
    keep = np.zeros(len(items), dtype=bool)
    keep[np.unique(items, return_index=True)[1]] = True
    bounds = np.cumsum([bank.num_rows for bank in banks])[:-1]
    selections = [
        Selection(bank.path, bank.index, bank.rows, kept, number)
        for bank, kept, number in zip(banks, np.split(keep, bounds), numbers, strict=True)
    ]
    duplicates = int((~keep).sum())
    with locked(out):
        write_selections(out, selections, f"merged from {len(banks)} banks, {duplicates} duplicate rows left out")
    return Merged(rows=int(keep.sum()), duplicates=duplicates)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the work folder stays when an interrupted inversion has something in it."""
    with closing(lock(folder)):
        try:
            yield
        finally:
            with suppress(OSError):
                (folder / WORK).rmdir()


def refuse_occupied(out: Path) -> None:
    """Raise BankError when `out` is a bank already, or holds something else."""
    refuse_foreign(out)
    if (out / INDEX).exists():
        raise BankError(f"{out}: a bank is there already; choose a new folder")


def write_selections(out: Path, selections: Sequence[Selection], edit: str) -> None:
    """Write the bank of the selected rows to a locked folder; a folder's own bank is replaced at the last step.

    Shards of which every row is kept are copied as they are, or left alone in place. Every part must keep a row. What
    an interrupted inversion left in the folder is removed.
    Raises BankError when a file's bytes are not those its index names, or the disk is full.
    """
    first = selections[0].index
    parts = [part | {"shards": _write_part(out, selections, part["name"])} for part in first["parts"]]
    rows = _row_tensors(selections)
    mark = rows_fingerprint(rows)
    file = out / f"rows-{mark}.safetensors"
    data = shard_bytes(rows, [(mark, len(rows["label"]))])
    write_atomically(file, data, out / WORK)
    index = {
        "format": FORMAT,
        "version": VERSION,
        "num_rows": len(rows["label"]),
        "class_names": first["class_names"],
        "meta": first["meta"],
        "fingerprint": hash_of(mark, parts, first["class_names"], first["meta"]),
        "edits": [sentence for selection in selections for sentence in selection.index["edits"]] + [edit],
        "rows": file_entry(file, len(rows["label"]), hashlib.sha256(data).hexdigest()),
        "parts": parts,
    }
    write_atomically(out / INDEX, seal(index), out / WORK)
    used = {entry["file"] for entry in file_entries(index)}
    for unused in data_files(out):
        if unused.name not in used:
            unused.unlink()
    shutil.rmtree(out / WORK)


def _drop(bank: LatentBank, out: Path, classes: Sequence[str], hashes: Path | None, quality: str | None) -> Dropped:
    unwanted, unmatched = _unwanted(bank, classes, hashes, quality)
    _refuse_all(bank, unwanted)
    counts = np.bincount(bank.labels[unwanted], minlength=len(bank.class_names)).tolist()
    by_class = {name: count for name, count in zip(bank.class_names, counts, strict=True) if count}
    if unwanted.any() or out != bank.path:
        edit = f"{int(unwanted.sum())} of {bank.num_rows} rows dropped"
        write_selections(out, [Selection(bank.path, bank.index, bank.rows, ~unwanted)], edit)
    return Dropped(by_class, left=int((~unwanted).sum()), unmatched=unmatched)


def _unwanted(
    bank: LatentBank, classes: Sequence[str], hashes: Path | None, quality: str | None
) -> tuple[np.ndarray, int]:
    """Rows that a condition names, bool [R], and the lines of the list that name none."""
    unwanted = np.zeros(bank.num_rows, dtype=bool)
    for name in classes:
        if name not in bank.class_names:
            raise BankError(
                f"{bank.path}: no class '{name}'{nearest(name, bank.class_names)}; "
                f"its classes: {', '.join(bank.class_names)}"
            )
        unwanted |= bank.labels == bank.class_names.index(name)
    unmatched = 0
    if hashes is not None:
        rows, unmatched = _listed_rows(bank, hashes)
        unwanted[rows] = True
    if quality is not None:
        unwanted |= _of_quality(bank, quality)
    return unwanted, unmatched


def _listed_rows(bank: LatentBank, file: Path) -> tuple[np.ndarray, int]:
    try:
        lines = {line.strip() for line in file.read_text(encoding="utf-8", errors="surrogateescape").splitlines()} - {
            ""
        }
    except OSError as error:
        raise UsageError(f"{file}: cannot be read: {error.strerror}") from None
    hashes = {line for line in lines if _HASH.fullmatch(line)}
    rows = np.union1d(bank.rows_with(hashes), bank.rows_named(lines - hashes))
    found = {bank.source_hash(row) for row in rows.tolist()} | {bank.source_name(row) for row in rows.tolist()}
    if not len(rows):
        raise BankError(
            f"{bank.path}: none of the {len(lines)} lines of {file} is a source hash (64 hexadecimal digits) or a "
            f"source name of this bank, such as {bank.source_name(0)}"
        )
    return rows, len(lines - found)


def _of_quality(bank: LatentBank, condition: str) -> np.ndarray:
    """Rows for which "array>number" holds: bool [R]."""
    match = _CONDITION.fullmatch(condition)
    try:
        name, operator, limit = match.group(1), match.group(2), float(match.group(3))  # type: ignore[union-attr]
    except (AttributeError, ValueError):
        raise UsageError(
            f"quality '{condition}': expected a row array, one of < <= > >= and a number, such as 'ddim.error>0.1'"
        ) from None
    return _COMPARE[operator](bank.row_array(name), limit)


def _refuse_all(bank: LatentBank, unwanted: np.ndarray) -> None:
    if unwanted.all():
        raise BankError(f"{bank.path}: all {bank.num_rows} rows would be dropped; delete the folder if that is meant")


def _write_part(out: Path, selections: Sequence[Selection], part: str) -> list[dict[str, Any]]:
    """The part's shards of the selected rows: their entries for the index."""
    shards: list[dict[str, Any]] = []
    for selection in selections:
        start = 0
        for entry in next(there["shards"] for there in selection.index["parts"] if there["name"] == part):
            keep = selection.keep[start : start + entry["rows"]]
            start += entry["rows"]
            if keep.all() and selection.folder == out:
                shards.append(entry)
            elif keep.any():
                number = entry["file"].split("-")[1] if len(selections) == 1 else f"{len(shards):05d}"
                shards.append(_write_shard(out, selection.folder, entry, keep, f"{part}-{number}"))
    return shards


def _write_shard(out: Path, folder: Path, entry: dict[str, Any], keep: np.ndarray, name: str) -> dict[str, Any]:
    """Write the kept rows of a shard as `name` and a hash."""
    source = folder / entry["file"]
    try:
        data = source.read_bytes()
    except OSError as error:
        raise BankError(f"{source}: cannot be read: {error.strerror}") from None
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise BankError(
            f"{source}: its bytes are not those that were written; `streamaug bank verify {folder} --repair` drops its "
            "rows, `streamaug invert` computes them again"
        )
    mark = source.stem.rsplit("-", 1)[1]
    if not keep.all():
        mark = hash_of(entry["file"], np.packbits(keep).tobytes().hex())
        rows = torch.from_numpy(np.flatnonzero(keep))
        tensors = {key: tensor.index_select(0, rows) for key, tensor in load(data).items()}
        data = shard_bytes(tensors, _groups_left(groups_in(source), keep))
    file = out / f"{name}-{mark}.safetensors"
    write_atomically(file, data, out / WORK)
    return file_entry(file, int(keep.sum()), hashlib.sha256(data).hexdigest())


def _groups_left(groups: list[tuple[str, int]], keep: np.ndarray) -> list[tuple[str, int]]:
    """The groups of a shard after rows went: one that lost some has a fingerprint that no plan asks for."""
    left, start = [], 0
    for fingerprint, rows in groups:
        kept = keep[start : start + rows]
        start += rows
        if kept.all():
            left.append((fingerprint, rows))
        elif kept.any():
            left.append((hash_of(fingerprint, kept.tolist()), int(kept.sum())))
    return left


def _row_tensors(selections: Sequence[Selection]) -> dict[str, torch.Tensor]:
    """The rows file's tensors for the selected rows, with the group of each row in each part."""
    columns: dict[str, list[np.ndarray]] = {}
    for selection in selections:
        rows = {name: tensor.numpy() for name, tensor in selection.rows.items()}
        keep, labels = selection.keep, rows["label"]
        lengths = np.diff(rows["source_name_end"], prepend=0)
        columns.setdefault("label", []).append(
            (labels if selection.numbers is None else selection.numbers[labels])[keep]
        )
        columns.setdefault("source_names", []).append(rows["source_names"][np.repeat(keep, lengths)])
        columns.setdefault("source_name_end", []).append(lengths[keep])
        for name in ("source_hash", "path_hash", "perceptual_hash"):
            if name in rows:
                columns.setdefault(name, []).append(rows[name][keep])
        for part in selection.index["parts"]:
            numbers = columns.setdefault(f"group.{part['name']}", [])
            own = Groups(part, selection.rows).of(np.flatnonzero(keep))
            numbers.append((own + _next_number(numbers)).astype(np.int32))
    if len(columns.get("perceptual_hash", selections)) < len(selections):
        del columns["perceptual_hash"]
    tensors = {name: np.concatenate(values) for name, values in columns.items()}
    tensors["source_name_end"] = np.cumsum(tensors["source_name_end"])
    return {name: torch.from_numpy(values) for name, values in tensors.items()}


def _next_number(numbers: list[np.ndarray]) -> int:
    """The first group number that no row before has."""
    return next((int(part[-1]) + 1 for part in reversed(numbers) if len(part)), 0)


def _refuse_unlike(first: LatentBank, other: LatentBank) -> None:
    one, two = _described(first), _described(other)
    for key in [*one, *(key for key in two if key not in one)]:
        if one.get(key) != two.get(key):
            raise MismatchError(
                f"{other.path} cannot be merged with {first.path}: {key} is {two.get(key)!r} there and "
                f"{one.get(key)!r} here"
            )


def _described(bank: LatentBank) -> dict[str, Any]:
    """All that banks must share to be merged, by what a message calls it."""
    parts = bank.index["parts"]
    described = {
        "the list of methods": ", ".join(part["name"] for part in parts),
        "the set of classes": ", ".join(sorted(bank.class_names)),
        **_flat("meta", bank.meta),
    }
    for part in parts:
        for key in ("dtype", "group_rows", "meta", "tensors"):
            described |= _flat(f"{part['name']}.{key}", part[key])
    return described


def _flat(prefix: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {name: leaf for key, inner in value.items() for name, leaf in _flat(f"{prefix}.{key}", inner).items()}

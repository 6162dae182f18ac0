"""Writing a bank: groups of rows put one by one, interruptible at any byte, one writer at a time."""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from streamaug.bank.files import (
    FORMAT,
    INDEX,
    LOCK,
    VERSION,
    WORK,
    file_entry,
    groups_in,
    load_shard,
    read_index,
    refuse_foreign,
    seal,
    sha256_of,
    shard_bytes,
    write_atomically,
)
from streamaug.bank.plan import BankPlan, Group
from streamaug.bank.reader import LatentBank, not_finite_rows
from streamaug.errors import BankError


class BankWriter:
    """Writes the bank a plan describes; interrupted anywhere and started again, it goes on from there.

        with BankWriter(path, plan) as writer:
            for group in writer.pending():
                writer.put(group, {"latent": ...})
            bank = writer.finish()

    Groups that an earlier run, finished or not, computed from the same sources, labels and meta are kept.
    """

    def __init__(self, path: str | os.PathLike, plan: BankPlan):
        """Make the folder and lock it.

        Raises BankError when the plan is empty, or the folder cannot be written, holds something else, has a
        bank of another format version, or is being written by another process.
        """
        self.path = Path(path)
        self.plan = plan
        if plan.num_rows == 0:
            raise BankError(f"{path}: no images to put into the bank")
        refuse_foreign(self.path)
        self._lock = _lock(self.path)
        self._work = self.path / WORK
        self._checksums = _known_checksums(self.path)
        self._wanted = set(plan.group_fingerprints)
        self._stored: dict[str, tuple[Path, int, int]] = {}  # fingerprint -> its rows [start, stop) of a file
        for file in sorted(self._work.glob("group-*.safetensors")):
            self._record(file)
        for file in sorted(self.path.glob("shard-*.safetensors"), key=lambda file: file.name in plan.shard_names):
            if self._checksums.get(file.name) in (None, sha256_of(file)):
                self._record(file)

    def __enter__(self) -> "BankWriter":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the next writer in; what was put is kept for it."""
        self._lock.close()

    @property
    def done_rows(self) -> int:
        """Rows that need no more computing."""
        return sum(len(group.rows) for group in self.plan.groups if self._has(group))

    def pending(self) -> Iterator[Group]:
        """The groups still to be computed, in order."""
        return (group for group in self.plan.groups if not self._has(group))

    def put(self, group: Group, tensors: Mapping[str, torch.Tensor]) -> None:
        """Store a group's tensors, each [n or group_rows, ...]; on return they survive a crash.

        Raises BankError when a row is not finite in the bank's dtype, when the tensors differ from those of
        other groups in name, dtype or shape, or when the disk is full.
        """
        stored = {name: self._stored_form(name, tensor, group) for name, tensor in sorted(tensors.items())}
        self._same_shapes(stored)
        fingerprint = self.plan.group_fingerprints[group.number]
        file = self._work / f"group-{group.number:08d}-{fingerprint}.safetensors"
        self._write(file, stored, [(fingerprint, len(group.rows))])
        self._record(file)
        shard = group.number // len(self.plan.shards[0])
        if all(self._has(member) for member in self.plan.shards[shard]):
            self._write_shard(shard)

    def finish(self) -> LatentBank:
        """Publish the bank, remove what it does not need, and open it.

        An older bank there stays whole until then. Raises BankError when groups are missing or the disk is
        full.
        """
        missing = sum(1 for _ in self.pending())
        if missing:
            raise BankError(f"{self.path}: {missing} of {len(self.plan.groups)} groups are not computed yet")
        shards = [self._write_shard(number) for number in range(len(self.plan.shards))]
        rows = self.path / f"rows-{self.plan.rows_fingerprint}.safetensors"
        if not groups_in(rows):
            self._write(rows, self.plan.row_tensors, [(self.plan.rows_fingerprint, self.plan.num_rows)])
        index = {
            "format": FORMAT,
            "version": VERSION,
            "num_rows": self.plan.num_rows,
            "class_names": list(self.plan.class_names),
            "meta": dict(self.plan.meta),
            "fingerprint": self.plan.fingerprint,
            "rows": file_entry(rows, self.plan.num_rows, self._checksums.get(rows.name)),
            "shards": shards,
        }
        write_atomically(self.path / INDEX, seal(index), self._work)
        used = {rows.name, *(entry["file"] for entry in shards)}
        for file in (*self.path.glob("rows-*.safetensors"), *self.path.glob("shard-*.safetensors")):
            if file.name not in used:
                file.unlink()
        shutil.rmtree(self._work)
        return LatentBank.open(self.path)

    def _has(self, group: Group) -> bool:
        return self.plan.group_fingerprints[group.number] in self._stored

    def _stored_form(self, name: str, tensor: torch.Tensor, group: Group) -> torch.Tensor:
        """The group's own rows, on the CPU, in the bank's dtype."""
        count = len(group.rows)
        if len(tensor) not in (count, self.plan.group_rows):
            raise BankError(
                f"{self.path}: '{name}' has {len(tensor)} rows for a group of {count} (padded: {self.plan.group_rows})"
            )
        dtype = self.plan.torch_dtype if tensor.is_floating_point() else tensor.dtype
        rows = tensor.detach()[:count].to("cpu", dtype).contiguous()
        bad = not_finite_rows(rows)
        if bad:
            raise BankError(
                f"{self.path}: '{name}' is not finite in {self.plan.dtype} for {len(bad)} of {count} images "
                f"(the first: {self.plan.source_names[group.rows[bad[0]]]}); check the model's weights and "
                "dtype, or set bank.dtype: float32"
            )
        return rows

    def _same_shapes(self, tensors: Mapping[str, torch.Tensor]) -> None:
        if not self._stored:
            return
        other = load_shard(next(iter(self._stored.values()))[0])
        given, expected = _shapes(tensors), _shapes(other)
        if given != expected:
            raise BankError(f"{self.path}: a group's tensors are {given}, those of the others {expected}")

    def _write_shard(self, number: int) -> dict[str, Any]:
        """Gather a shard's groups into their file, unless it is there; its entry for the index."""
        groups = self.plan.shards[number]
        fingerprints = [self.plan.group_fingerprints[group.number] for group in groups]
        stored = [self._stored[fingerprint] for fingerprint in fingerprints]
        file = self.path / self.plan.shard_names[number]
        if any(part != file for part, _, _ in stored):
            parts = [(load_shard(part), start, stop) for part, start, stop in stored]
            tensors = {name: torch.cat([rows[name][start:stop] for rows, start, stop in parts]) for name in parts[0][0]}
            counts = [len(group.rows) for group in groups]
            self._write(file, tensors, list(zip(fingerprints, counts, strict=True)))
            self._record(file)
            for part in {part for part, _, _ in stored if part.parent == self._work}:
                part.unlink()
        return file_entry(file, sum(len(group.rows) for group in groups), self._checksums.get(file.name))

    def _write(self, file: Path, tensors: dict[str, torch.Tensor], groups: list[tuple[str, int]]) -> None:
        data = shard_bytes(tensors, groups)
        write_atomically(file, data, self._work)
        self._checksums[file.name] = hashlib.sha256(data).hexdigest()

    def _record(self, file: Path) -> None:
        """Note where the wanted groups among those a file lists are found."""
        start = 0
        for fingerprint, rows in groups_in(file):
            if fingerprint in self._wanted:
                self._stored[fingerprint] = (file, start, start + rows)
            start += rows


def open_if_current(path: str | os.PathLike, plan: BankPlan) -> LatentBank | None:
    """The bank at `path` if it is what the plan asks for and complete. Writes nothing."""
    try:
        bank = LatentBank.open(path)
    except BankError:
        return None
    return bank if bank.fingerprint == plan.fingerprint and not (bank.path / WORK).exists() else None


def _known_checksums(folder: Path) -> dict[str, str]:
    """Checksums of the files of the bank that is there, by name; none when there is no readable bank yet."""
    try:
        index = read_index(folder)
    except BankError:
        return {}
    return {entry["file"]: entry["sha256"] for entry in (index["rows"], *index["shards"])}


def _lock(folder: Path) -> BinaryIO:
    """Create the folder and lock it: the open lock file. The lock ends with the process, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "ab")  # noqa: SIM115
    except OSError as error:
        raise _unwritable(folder, error) from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (folder / WORK).mkdir(exist_ok=True)
    except BlockingIOError:
        file.close()
        raise BankError(f"{folder}: another process is writing this bank; wait for it to end") from None
    except OSError as error:
        file.close()
        raise _unwritable(folder, error) from None
    return file


def _unwritable(folder: Path, error: OSError) -> BankError:
    return BankError(f"{folder}: cannot be written: {error.strerror}; set bank.path to a writable folder")


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    return {name: f"{tensor.dtype} {list(tensor.shape[1:])}" for name, tensor in tensors.items()}

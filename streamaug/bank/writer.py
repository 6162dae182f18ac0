"""Writing a bank: each part's groups of rows put one by one, interruptible at any byte, one writer at a time."""

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from streamaug.bank.checkpoint import Checkpoint
from streamaug.bank.files import (
    FORMAT,
    INDEX,
    VERSION,
    WORK,
    data_files,
    file_entries,
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
from streamaug.bank.lock import lock
from streamaug.bank.plan import BankPlan, Group, Part
from streamaug.bank.reader import LatentBank, not_finite_rows
from streamaug.errors import BankError


class BankWriter:
    """Writes the bank a plan describes; interrupted anywhere and started again, it goes on from there.

        with BankWriter(path, plan) as writer:
            for group in writer.pending("ddim"):
                writer.put("ddim", group, {"inverted": ..., "ddim.error": ...})
            bank = writer.finish()

    Groups that an earlier run, finished or not, computed from the same sources, labels and settings are kept.
    """

    def __init__(self, path: str | os.PathLike, plan: BankPlan, others: Iterable[Path] = ()):
        """Make the folder and lock it. others: banks from which the groups that this one needs too are copied.

        Raises BankError when the plan has parts but no rows, or the folder cannot be written, holds something else,
        has a bank of another format version, or is being written by another process.
        """
        self.path = Path(path)
        self.plan = plan
        if plan.parts and plan.num_rows == 0:
            raise BankError(f"{path}: no images to put into the bank")
        refuse_foreign(self.path)
        self._lock = lock(self.path)
        self._work = self.path / WORK
        self._checksums = _known_checksums(self.path)
        self._forms: dict[str, dict[str, str]] = {}  # part -> dtype and shape of its tensors
        self._wanted = {mark for part in plan.parts for mark in plan.layout(part.name).fingerprints}
        self._stored: dict[str, tuple[Path, int, int]] = {}  # fingerprint -> its rows [start, stop) of a file
        for other in others:
            self._record_other(other)
        finished = {name for part in plan.parts for name in plan.layout(part.name).shard_names}
        for file in sorted(self._work.glob("*-group-*.safetensors")):
            self._record(file)
        for file in sorted(data_files(self.path), key=lambda file: file.name in finished):
            if self._checksums.get(file.name) in (None, sha256_of(file)):
                self._record(file)

    def __enter__(self) -> "BankWriter":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the next writer in; what was put is kept for it."""
        self._lock.close()

    def done_rows(self, part: str) -> int:
        """Rows of the part that need no more computing."""
        return sum(len(group.rows) for group in self.plan.groups(part) if self._has(part, group))

    def pending(self, part: str) -> Iterator[Group]:
        """The part's groups still to be computed, in order."""
        return (group for group in self.plan.groups(part) if not self._has(part, group))

    def checkpoint(self, part: str, group: Group) -> Checkpoint:
        """Where a group that takes long may keep its progress; `put` removes it."""
        return Checkpoint(self._work / f"{part}-checkpoint-{self._fingerprint(part, group)}.safetensors")

    def put(self, part: str, group: Group, tensors: Mapping[str, torch.Tensor]) -> None:
        """Store a group's tensors, each [n or group_rows, ...]; on return they survive a crash.

        A tensor of one axis is a row array, with a dot in its name ("ddim.error"), stored in float32. Names are
        unique in the bank. Raises BankError when a row is not finite in the part's dtype, when names do not fit, when
        the tensors differ from those of other groups in name, dtype or shape, or when the disk is full.
        """
        settings = self.plan.part(part)
        stored = {name: self._stored_form(settings, name, tensor, group) for name, tensor in sorted(tensors.items())}
        self._same_form(part, stored)
        fingerprint = self._fingerprint(part, group)
        file = self._work / f"{part}-group-{group.number:08d}-{fingerprint}.safetensors"
        self._write(file, stored, [(fingerprint, len(group.rows))])
        self._record(file)
        self.checkpoint(part, group).remove()
        layout = self.plan.layout(part)
        shard = group.number // layout.shard_groups
        if all(self._has(part, member) for member in layout.shards[shard]):
            self._write_shard(part, shard)

    def finish(self) -> LatentBank:
        """Publish the bank, remove what it does not need, and open it.

        An older bank there stays whole until then. Raises BankError when groups are missing or the disk is full.
        """
        for part in self.plan.parts:
            missing = sum(1 for _ in self.pending(part.name))
            if missing:
                count = len(self.plan.groups(part.name))
                raise BankError(f"{self.path}: {missing} of {count} groups of '{part.name}' are not computed yet")
        parts = [self._finish_part(part) for part in self.plan.parts]
        rows = self.path / f"rows-{self.plan.rows_fingerprint}.safetensors"
        self._write(rows, self.plan.row_tensors, [(self.plan.rows_fingerprint, self.plan.num_rows)])
        index = {
            "format": FORMAT,
            "version": VERSION,
            "num_rows": self.plan.num_rows,
            "class_names": list(self.plan.class_names),
            "meta": dict(self.plan.meta),
            "fingerprint": self.plan.fingerprint,
            "edits": [],
            "rows": file_entry(rows, self.plan.num_rows, self._checksums.get(rows.name)),
            "parts": parts,
        }
        write_atomically(self.path / INDEX, seal(index), self._work)
        used = {entry["file"] for entry in file_entries(index)}
        for file in data_files(self.path):
            if file.name not in used:
                file.unlink()
        shutil.rmtree(self._work)
        return LatentBank.open(self.path)

    def _finish_part(self, part: Part) -> dict[str, Any]:
        """The part's entry for the index; its shards are written where they are not there yet."""
        shards = [self._write_shard(part.name, number) for number in range(len(self.plan.layout(part.name).shards))]
        first = load_shard(self.path / shards[0]["file"])
        return {
            "name": part.name,
            "meta": dict(part.meta),
            "group_rows": part.group_rows,
            "dtype": part.dtype,
            "tensors": {
                name: {"dtype": _dtype(tensor), "shape": list(tensor.shape[1:])} for name, tensor in first.items()
            },
            "shards": shards,
        }

    def _fingerprint(self, part: str, group: Group) -> str:
        return self.plan.layout(part).fingerprints[group.number]

    def _has(self, part: str, group: Group) -> bool:
        return self._fingerprint(part, group) in self._stored

    def _stored_form(self, part: Part, name: str, tensor: torch.Tensor, group: Group) -> torch.Tensor:
        """The group's own rows, on the CPU, in the dtype they are stored in."""
        count = len(group.rows)
        if tensor.ndim == 0 or len(tensor) not in (count, part.group_rows):
            given = f"{len(tensor)} rows" if tensor.ndim else "no rows"
            raise BankError(f"{self.path}: '{name}' has {given} for a group of {count} (padded: {part.group_rows})")
        if ("." in name) != (tensor.ndim == 1):
            raise BankError(
                f"{self.path}: '{name}' has the shape {list(tensor.shape)}; a tensor with one value a row has a dot in "
                f"its name, such as {part.name}.error, and no other has"
            )
        if tensor.ndim == 1:
            dtype = torch.float32
        else:
            dtype = part.torch_dtype if tensor.is_floating_point() else tensor.dtype
        rows = tensor.detach()[:count].to("cpu", dtype).contiguous()
        bad = not_finite_rows(rows)
        if bad:
            raise BankError(
                f"{self.path}: '{name}' is not finite in {_dtype(rows)} for {len(bad)} of {count} images "
                f"(the first: {self.plan.source_names[group.rows[bad[0]]]}); check the model's weights and "
                "dtype, or set bank.dtype: float32"
            )
        return rows

    def _same_form(self, part: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Refuse tensors unlike those of the part's other groups, and names that another part has."""
        given = {name: f"{tensor.dtype} {list(tensor.shape[1:])}" for name, tensor in tensors.items()}
        for other in self.plan.parts:
            expected = self._form(other.name)
            if other.name == part and expected and given != expected:
                raise BankError(f"{self.path}: a group's tensors are {given}, those of the others {expected}")
            if other.name != part and expected.keys() & given.keys():
                names = ", ".join(sorted(expected.keys() & given.keys()))
                raise BankError(f"{self.path}: '{part}' gives {names}, which '{other.name}' has: names are unique")
        self._forms[part] = given

    def _form(self, part: str) -> dict[str, str]:
        """Dtype and row shape of the part's tensors that are stored; empty while there are none."""
        if part not in self._forms:
            marks = self.plan.layout(part).fingerprints
            file = next((self._stored[mark][0] for mark in marks if mark in self._stored), None)
            tensors = self._load(file) if file else {}
            form = {name: f"{tensor.dtype} {list(tensor.shape[1:])}" for name, tensor in tensors.items()}
            if not form:
                return form
            self._forms[part] = form
        return self._forms[part]

    def _write_shard(self, part: str, number: int) -> dict[str, Any]:
        """Gather a shard's groups into their file, unless it is there; its entry for the index."""
        layout = self.plan.layout(part)
        groups = layout.shards[number]
        fingerprints = [layout.fingerprints[group.number] for group in groups]
        stored = [self._stored[fingerprint] for fingerprint in fingerprints]
        file = self.path / layout.shard_names[number]
        if any(source != file for source, _, _ in stored):
            sources = [(self._load(source), start, stop) for source, start, stop in stored]
            tensors = {
                name: torch.cat([rows[name][start:stop] for rows, start, stop in sources]) for name in sources[0][0]
            }
            counts = [len(group.rows) for group in groups]
            self._write(file, tensors, list(zip(fingerprints, counts, strict=True)))
            self._record(file)
            for source in {source for source, _, _ in stored if source.parent == self._work}:
                source.unlink()
        return file_entry(file, sum(len(group.rows) for group in groups), self._checksums.get(file.name))

    def _load(self, file: Path) -> dict[str, torch.Tensor]:
        """A file's tensors. Raises BankError when it is another bank's, and has gone since its groups were noted."""
        try:
            return load_shard(file)
        except (OSError, SafetensorError) as error:
            if self.path in file.parents:
                raise
            raise BankError(
                f"{self.path}: rows were to be copied from {file}, which has changed meanwhile ({error}); start again: "
                "what was finished is kept, and these rows are computed"
            ) from None

    def _write(self, file: Path, tensors: dict[str, torch.Tensor], groups: list[tuple[str, int]]) -> None:
        data = shard_bytes(tensors, groups)
        write_atomically(file, data, self._work)
        self._checksums[file.name] = hashlib.sha256(data).hexdigest()

    def _record_other(self, folder: Path) -> None:
        """Note the wanted groups in another bank's files, where those are what its index says."""
        checksums = _known_checksums(folder)
        for file in sorted(data_files(folder)):
            wanted = any(fingerprint in self._wanted for fingerprint, _ in groups_in(file))
            with suppress(OSError):  # whoever writes that bank may remove a file at any time
                if wanted and checksums.get(file.name) == sha256_of(file):
                    self._record(file)

    def _record(self, file: Path) -> None:
        """Note where the wanted groups among those a file lists are found."""
        start = 0
        for fingerprint, rows in groups_in(file):
            if fingerprint in self._wanted:
                self._stored[fingerprint] = (file, start, start + rows)
            start += rows


def open_if_current(path: str | os.PathLike, plan: BankPlan) -> LatentBank | None:
    """The bank at `path` if it holds all that the plan asks for, and perhaps other parts. Writes nothing."""
    try:
        bank = LatentBank.open(path)
    except BankError:
        return None
    there = {part["name"]: [entry["file"] for entry in part["shards"]] for part in bank.index["parts"]}
    complete = all(there.get(part.name) == plan.layout(part.name).shard_names for part in plan.parts)
    rows = f"rows-{plan.rows_fingerprint}.safetensors" == bank.index["rows"]["file"]
    same = list(plan.class_names) == bank.class_names and dict(plan.meta) == bank.meta
    return bank if complete and rows and same and not (bank.path / WORK).exists() else None


def _known_checksums(folder: Path) -> dict[str, str]:
    """Checksums of the files of the bank that is there, by name; none when there is no readable bank yet."""
    try:
        index = read_index(folder)
    except BankError:
        return {}
    return {entry["file"]: entry["sha256"] for entry in file_entries(index)}


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")

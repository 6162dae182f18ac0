"""Reading a bank: the labels in memory, the tensors memory-mapped, any rows gathered."""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from streamaug.bank.files import load_shard, path_hash, read_index, seal
from streamaug.errors import BankError

_CACHED_MEANS = 1024


class LatentBank:
    """A finished bank, opened for reading; only the rows that are used become resident.

    path: its folder; num_rows: R; labels: int64 [R]; class_names: what the labels index; meta: what is known of the
    rows ("model", "image_shape", ...); parts: each part's own meta, by its name; tensor_names: tensors of more than one
    axis; row_arrays: names of those with one value a row; edits: sentences on what `drop` and `merge` did since the
    inversion; digest: sha256 of the bank's contents; fingerprint: hash of what it was made from; index, rows: the
    parsed index and the tensors of the rows file, for those who make a bank from this one.
    """

    def __init__(self, path: Path, index: dict[str, Any]):
        """Use `LatentBank.open`."""
        self.path = path
        self.index = index
        self.num_rows: int = index["num_rows"]
        self.class_names: list[str] = index["class_names"]
        self.meta: dict[str, Any] = index["meta"]
        self.edits: list[str] = index["edits"]
        self.fingerprint: str = index["fingerprint"]
        self.digest = hashlib.sha256(seal(index)).hexdigest()
        self.parts: dict[str, dict[str, Any]] = {part["name"]: part["meta"] for part in index["parts"]}
        self.rows = open_file(path, index["rows"])
        self._columns: dict[str, _Column] = {}
        self._tensors_of: dict[str, list[str]] = {}
        self._groups: dict[str, Groups] = {}
        for part in index["parts"]:
            shards = [open_file(path, entry) for entry in part["shards"]]
            starts = np.cumsum([0] + [entry["rows"] for entry in part["shards"]])  # [shards + 1]
            self._groups[part["name"]] = Groups(part, self.rows)
            self._tensors_of[part["name"]] = [name for name, form in part["tensors"].items() if form["shape"]]
            for name in part["tensors"]:
                self._columns[name] = _Column(part["name"], [shard[name] for shard in shards], starts)
        self.tensor_names = [name for names in self._tensors_of.values() for name in names]
        self.row_arrays = [name for name in self._columns if name not in self.tensor_names]
        self.labels: np.ndarray = self.rows["label"].numpy()
        self._means: dict[str, torch.Tensor] = {}
        self._mean_of_group = lru_cache(_CACHED_MEANS)(self._compute_group_mean)

    @classmethod
    def open(cls, path: str | os.PathLike) -> "LatentBank":
        """Open a bank folder. Raises BankError when it is none, is damaged, or is of another format version."""
        folder = Path(path)
        return cls(folder, read_index(folder))

    def __len__(self) -> int:
        return self.num_rows

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the source images."""
        channels, height, width = self.meta["image_shape"]
        return channels, height, width

    @property
    def source_hashes(self) -> list[str]:
        """sha256 of each row's source pixels, in hexadecimal: [R]."""
        return [digest.tobytes().hex() for digest in self.rows["source_hash"].numpy()]

    @property
    def source_names(self) -> list[str]:
        """Where each row's source image came from: [R]."""
        return [self.source_name(row) for row in range(self.num_rows)]

    @property
    def perceptual_hashes(self) -> np.ndarray | None:
        """V32 [R] of `streamaug.data.perceptual`, or None in a bank that was written without."""
        stored = self.rows.get("perceptual_hash")
        return None if stored is None else _as_items(stored.numpy())

    def source_hash(self, row: int) -> str:
        """sha256 of the row's source pixels, in hexadecimal."""
        return self.rows["source_hash"][row].numpy().tobytes().hex()

    def source_name(self, row: int) -> str:
        """Where the row's source image came from."""
        return name_of(self.rows, row)

    def rows_with(self, hashes: Iterable[str]) -> np.ndarray:
        """The rows whose source has one of these hashes (sha256, hexadecimal): int64 [n], ascending."""
        return self._rows_among("source_hash", [bytes.fromhex(digest) for digest in hashes])

    def rows_named(self, names: Iterable[str]) -> np.ndarray:
        """The rows whose source has one of these names: int64 [n], ascending."""
        return self._rows_among("path_hash", [path_hash(name) for name in names])

    def _rows_among(self, column: str, digests: list[bytes]) -> np.ndarray:
        stored = self.rows[column].numpy()
        wanted = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, stored.shape[1])
        # Few rows share the first 8 bytes with one that is wanted: comparing integers leaves little to compare in full.
        likely = np.flatnonzero(np.isin(stored[:, :8].view(np.uint64)[:, 0], wanted[:, :8].view(np.uint64)[:, 0]))
        return likely[np.isin(_as_items(stored[likely]), _as_items(wanted))]

    def tensors_of(self, part: str) -> list[str]:
        """Names of the part's tensors of more than one axis; none when the bank lacks the part."""
        return self._tensors_of.get(part, [])

    def tensor(self, name: str) -> torch.Tensor:
        """All rows [R, ...] of a named tensor: the mapped file itself if there is one shard, else a copy."""
        shards = self._column(name).shards
        return shards[0] if len(shards) == 1 else torch.cat(shards)

    def row_array(self, name: str) -> np.ndarray:
        """One value a row: float32 [R]. Raises BankError for a name that is no row array of this bank."""
        if name not in self.row_arrays:
            raise BankError(f"{self.path}: no row array '{name}'; this bank has {_listed(self.row_arrays)}")
        return self.tensor(name).numpy()

    def gather(self, name: str, rows: np.ndarray | torch.Tensor | Sequence[int]) -> torch.Tensor:
        """A copy of the given rows [n, ...] of a named tensor, in their order. Only these rows are read.

        Raises BankError for an unknown name or a row outside the bank (-1, "no row", included).
        """
        column = self._column(name)
        return column.gather(self._checked(rows))

    def mean(self, name: str) -> torch.Tensor:
        """The mean over all rows of a named tensor, fp32 [...], summed in float64; computed once."""
        if name not in self._means:
            self._means[name] = self._column(name).mean(0, self.num_rows)
        return self._means[name]

    def group_mean(self, name: str, rows: np.ndarray | torch.Tensor | Sequence[int]) -> torch.Tensor:
        """For each row the mean of a named tensor over the group that the row was computed in: fp32 [n, ...].

        A group is `group_rows` consecutive rows of the part; where rows were dropped, those that are left of it. Sums
        in float64; the means used last are kept. Raises BankError as `gather` does.
        """
        column = self._column(name)
        groups, of_row = np.unique(self._groups[column.part].of(self._checked(rows)), return_inverse=True)
        if not len(groups):
            return torch.empty((0, *column.shards[0].shape[1:]))
        means = torch.stack([self._mean_of_group(name, group) for group in groups.tolist()])
        return means[torch.from_numpy(of_row)]

    def _compute_group_mean(self, name: str, group: int) -> torch.Tensor:
        column = self._column(name)
        return column.mean(*self._groups[column.part].range(group, self.num_rows))

    def _checked(self, rows: np.ndarray | torch.Tensor | Sequence[int]) -> np.ndarray:
        at = np.asarray(rows, dtype=np.int64)
        if len(at) and not (at.min() >= 0 and at.max() < self.num_rows):
            raise BankError(
                f"{self.path}: rows {at.min()} to {at.max()} asked for, the bank has 0 to {self.num_rows - 1}"
            )
        return at

    def _column(self, name: str) -> "_Column":
        if name not in self._columns:
            raise BankError(f"{self.path}: no tensor '{name}'; this bank has {_listed(list(self._columns))}")
        return self._columns[name]


class _Column:
    """One named tensor of all rows, in the shards of its part. starts: int64 [shards + 1], the first row of each."""

    def __init__(self, part: str, shards: list[torch.Tensor], starts: np.ndarray):
        self.part = part
        self.shards = shards
        self.starts = starts

    def gather(self, rows: np.ndarray) -> torch.Tensor:
        if len(self.shards) == 1:
            return self.shards[0].index_select(0, torch.from_numpy(rows))
        out = torch.empty((len(rows), *self.shards[0].shape[1:]), dtype=self.shards[0].dtype)
        shard_of = np.searchsorted(self.starts, rows, side="right") - 1
        for shard in np.unique(shard_of):
            here = np.flatnonzero(shard_of == shard)
            local = torch.from_numpy(rows[here] - self.starts[shard])
            out[torch.from_numpy(here)] = self.shards[shard].index_select(0, local)
        return out

    def mean(self, start: int, stop: int) -> torch.Tensor:
        """The mean of rows start to stop, fp32 [...], summed in float64."""
        total = torch.zeros(self.shards[0].shape[1:], dtype=torch.float64)
        for first, shard in zip(self.starts.tolist(), self.shards, strict=False):
            if first < stop and first + len(shard) > start:
                for row in shard[max(start - first, 0) : stop - first]:  # sum() would copy them all as float64
                    total += row
        return (total / (stop - start)).float()


class Groups:
    """Which group of a part each row belongs to; a group's rows are consecutive."""

    def __init__(self, part: Mapping[str, Any], rows: Mapping[str, torch.Tensor]):
        """part: its entry in the index; rows: the tensors of the rows file."""
        self._group_rows: int = part["group_rows"]
        # int32 [R], ascending: only where rows were dropped or banks merged.
        numbers = rows.get(f"group.{part['name']}")
        self._numbers = None if numbers is None else numbers.numpy()

    def of(self, rows: np.ndarray) -> np.ndarray:
        """The number of each row's group: int64 [n]."""
        return rows // self._group_rows if self._numbers is None else self._numbers[rows].astype(np.int64)

    def range(self, group: int, num_rows: int) -> tuple[int, int]:
        """First row and row after the last of a group."""
        if self._numbers is None:
            return group * self._group_rows, min((group + 1) * self._group_rows, num_rows)
        start, stop = np.searchsorted(self._numbers, np.array([group, group + 1], self._numbers.dtype))
        return int(start), int(stop)


def name_of(rows: Mapping[str, torch.Tensor], row: int) -> str:
    """A source's name, from the tensors of the rows file."""
    ends, names = rows["source_name_end"], rows["source_names"]
    begin = int(ends[row - 1]) if row > 0 else 0
    return names[begin : int(ends[row])].numpy().tobytes().decode("utf-8", "surrogateescape")


def not_finite_rows(tensor: torch.Tensor) -> list[int]:
    """Indices of the rows that hold a NaN or an infinity."""
    if not tensor.is_floating_point():
        return []
    return torch.nonzero(~torch.isfinite(tensor.reshape(len(tensor), -1)).all(1)).flatten().tolist()


def open_file(folder: Path, entry: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a file that the index names, memory-mapped. Raises BankError when it is damaged or missing."""
    file = folder / entry["file"]
    remedy = "run `streamaug invert` again: only its rows are redone"
    if not entry["file"].startswith("rows-"):
        remedy += f"; or drop them: streamaug bank verify {folder} --repair"
    try:
        size = file.stat().st_size
        if size != entry["bytes"]:
            raise BankError(f"{file}: {size} bytes of {entry['bytes']} are there; {remedy}")
        return load_shard(file)
    except FileNotFoundError:
        raise BankError(f"{file}: missing; {remedy}") from None
    except (OSError, SafetensorError) as error:
        raise BankError(f"{file}: cannot be read ({error}); {remedy}") from None


def _as_items(digests: np.ndarray) -> np.ndarray:
    """uint8 [n, k] as [n] items of k bytes, without a copy."""
    return digests.view(f"V{digests.shape[1]}")[:, 0]


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"

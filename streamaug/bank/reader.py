"""Reading a bank: the labels in memory, the tensors memory-mapped, any rows gathered."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from streamaug.bank.files import file_entry, load_shard, read_index, seal
from streamaug.errors import BankError


class LatentBank:
    """A finished bank, opened for reading; only the rows that are used become resident.

    path: its folder; num_rows: R; labels: int64 [R]; class_names: what the labels index; tensor_names;
    meta: what the method recorded ("method", "model", "image_shape", "value_range", ...); digest: sha256 of
    the bank's contents; fingerprint: hash of what it was made from.
    """

    def __init__(self, path: Path, index: dict[str, Any]):
        """Use `LatentBank.open`."""
        self.path = path
        self.num_rows: int = index["num_rows"]
        self.class_names: list[str] = index["class_names"]
        self.meta: dict[str, Any] = index["meta"]
        self.fingerprint: str = index["fingerprint"]
        self.digest = hashlib.sha256(seal(index)).hexdigest()
        self._entries: list[dict[str, Any]] = [index["rows"], *index["shards"]]
        self._rows, *self._shards = [_open(path, entry) for entry in self._entries]
        self._starts = np.cumsum([0] + [entry["rows"] for entry in index["shards"]])  # [shards + 1]
        self.tensor_names = list(self._shards[0])
        self._means: dict[str, torch.Tensor] = {}
        self.labels: np.ndarray = self._rows["label"].numpy()

    @classmethod
    def open(cls, path: str | os.PathLike) -> "LatentBank":
        """Open a bank folder. Raises BankError when it is none, is damaged, or is of a newer format."""
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
        return [digest.tobytes().hex() for digest in self._rows["source_hash"].numpy()]

    @property
    def source_names(self) -> list[str]:
        """Where each row's source image came from: [R]."""
        return [self.source_name(row) for row in range(self.num_rows)]

    def source_name(self, row: int) -> str:
        ends, names = self._rows["source_name_end"], self._rows["source_names"]
        begin = int(ends[row - 1]) if row > 0 else 0
        return names[begin : int(ends[row])].numpy().tobytes().decode("utf-8", "surrogateescape")

    def tensor(self, name: str) -> torch.Tensor:
        """All rows [R, ...] of a named tensor: the mapped file itself if there is one shard, else a copy."""
        parts = self._parts(name)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def gather(self, name: str, rows: np.ndarray | torch.Tensor | Sequence[int]) -> torch.Tensor:
        """A copy of the given rows [n, ...] of a named tensor, in their order. Only these rows are read.

        Raises BankError for an unknown name or a row outside the bank (-1, "no row", included).
        """
        parts = self._parts(name)
        at = np.asarray(rows, dtype=np.int64)
        if len(at) and not (at.min() >= 0 and at.max() < self.num_rows):
            raise BankError(
                f"{self.path}: rows {at.min()} to {at.max()} asked for, the bank has 0 to {self.num_rows - 1}"
            )
        if len(parts) == 1:
            return parts[0].index_select(0, torch.from_numpy(at))
        out = torch.empty((len(at), *parts[0].shape[1:]), dtype=parts[0].dtype)
        shard_of = np.searchsorted(self._starts, at, side="right") - 1
        for shard in np.unique(shard_of):
            here = np.flatnonzero(shard_of == shard)
            local = torch.from_numpy(at[here] - self._starts[shard])
            out[torch.from_numpy(here)] = parts[shard].index_select(0, local)
        return out

    def mean(self, name: str) -> torch.Tensor:
        """The mean over all rows of a named tensor, fp32 [...], summed in float64; computed once."""
        if name not in self._means:
            sums = [part.sum(0, dtype=torch.float64) for part in self._parts(name)]
            self._means[name] = (torch.stack(sums).sum(0) / self.num_rows).float()
        return self._means[name]

    def verify(self) -> list[str]:
        """Read every byte: a sentence for each file that has changed and each row that is not finite."""
        problems = []
        for entry in self._entries:
            file = self.path / entry["file"]
            if not file.exists() or file_entry(file, entry["rows"]) != entry:
                problems.append(
                    f"{file}: its bytes are not those that were written; delete it and run "
                    "`streamaug invert` again: only its rows are redone"
                )
        for name in self.tensor_names:
            for start, part in zip(self._starts, self._parts(name), strict=False):
                problems += [
                    f"row {start + row} ({self.source_name(start + row)}): '{name}' is not finite"
                    for row in not_finite_rows(part)
                ]
        return problems

    def _parts(self, name: str) -> list[torch.Tensor]:
        if name not in self.tensor_names:
            raise BankError(f"{self.path}: no tensor '{name}'; this bank has {', '.join(self.tensor_names)}")
        return [shard[name] for shard in self._shards]


def not_finite_rows(tensor: torch.Tensor) -> list[int]:
    """Indices of the rows that hold a NaN or an infinity."""
    if not tensor.is_floating_point():
        return []
    return torch.nonzero(~torch.isfinite(tensor.flatten(1)).all(1)).flatten().tolist()


def _open(folder: Path, entry: dict[str, Any]) -> dict[str, torch.Tensor]:
    file = folder / entry["file"]
    remedy = "run `streamaug invert` again: only its rows are redone"
    try:
        size = file.stat().st_size
        if size != entry["bytes"]:
            raise BankError(f"{file}: {size} bytes of {entry['bytes']} are there; {remedy}")
        return load_shard(file)
    except FileNotFoundError:
        raise BankError(f"{file}: missing; {remedy}") from None
    except (OSError, SafetensorError) as error:
        raise BankError(f"{file}: cannot be read ({error}); {remedy}") from None

"""What a bank is made from: the rows, their groups and shards, and the fingerprints that name them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch

from streamaug.bank.files import VERSION


@dataclass(frozen=True)
class Group:
    """Rows that are computed together.

    rows: int64 [n], the bank rows; padded: int64 [group_rows], the same with the last repeated, so that every
    group runs in one shape.
    """

    number: int
    rows: np.ndarray
    padded: np.ndarray


@dataclass(frozen=True, eq=False)
class BankPlan:
    """What a bank is made from, and so all that decides its bytes.

    labels: int64 [R]; source_hashes: sha256 hexadecimal [R]; source_names: [R]; class_names; meta: plain
    values, "image_shape" [C, H, W] and whatever else the tensors depend on (method and its settings, model
    digest); dtype: how floating-point tensors are stored. A group has `group_rows` rows, a shard `shard_rows`
    (rounded down to whole groups, at least one); the last of each may have fewer.
    """

    labels: np.ndarray
    source_hashes: Sequence[str]
    source_names: Sequence[str]
    class_names: Sequence[str]
    meta: Mapping[str, Any]
    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    shard_rows: int = 4096
    group_rows: int = 64

    @property
    def num_rows(self) -> int:
        return len(self.labels)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @cached_property
    def groups(self) -> list[Group]:
        rows = np.arange(self.num_rows, dtype=np.int64)
        parts = [rows[start : start + self.group_rows] for start in range(0, self.num_rows, self.group_rows)]
        return [
            Group(number, part, np.pad(part, (0, self.group_rows - len(part)), mode="edge"))
            for number, part in enumerate(parts)
        ]

    @cached_property
    def shards(self) -> list[list[Group]]:
        size = max(self.shard_rows // self.group_rows, 1)
        return [self.groups[start : start + size] for start in range(0, len(self.groups), size)]

    @cached_property
    def group_fingerprints(self) -> list[str]:
        """Hash of all that each group's tensors depend on."""
        shared = json.dumps(
            {"meta": dict(self.meta), "dtype": self.dtype, "group_rows": self.group_rows, "version": VERSION},
            sort_keys=True,
        )
        return [
            _hash(shared, group.number, [(self.source_hashes[row], int(self.labels[row])) for row in group.rows])
            for group in self.groups
        ]

    @cached_property
    def shard_names(self) -> list[str]:
        """File name of each shard: it changes with what the shard's groups depend on."""
        hashes = [_hash([self.group_fingerprints[group.number] for group in groups]) for groups in self.shards]
        return [f"shard-{number:05d}-{digest}.safetensors" for number, digest in enumerate(hashes)]

    @cached_property
    def row_tensors(self) -> dict[str, torch.Tensor]:
        """Label, source hash and source name of every row, as the rows file holds them."""
        names = [name.encode("utf-8", "surrogateescape") for name in self.source_names]
        return {
            "label": torch.from_numpy(np.asarray(self.labels, dtype=np.int64)),
            "source_hash": _bytes(bytes.fromhex("".join(self.source_hashes))).reshape(self.num_rows, -1),
            "source_names": _bytes(b"".join(names)),
            "source_name_end": torch.from_numpy(np.cumsum([len(name) for name in names], dtype=np.int64)),
        }

    @cached_property
    def rows_fingerprint(self) -> str:
        """Hash of the rows file's contents."""
        return _hash(*(hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for tensor in self.row_tensors.values()))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything here: a bank with this fingerprint is what the plan asks for."""
        return _hash(self.shard_names, self.rows_fingerprint, list(self.class_names))


def _bytes(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

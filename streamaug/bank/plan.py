"""What a bank is made from: the rows, and each part's groups, shards and the fingerprints that name them."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch

from streamaug.bank.files import VERSION, path_hash
from streamaug.errors import BankError

_PART_NAME = re.compile(r"[a-z][a-z0-9_]*")
_RESERVED = ("rows",)  # a part's files are named by it


_SHARD_BYTES = 2**28


@dataclass(frozen=True)
class Part:
    """What one method stores of every row.

    name: of the method, "encode", "ddim" or "embedding", in small letters; meta: plain values, all that its tensors
    depend on besides images and labels (settings, model digest, prompts digest); group_rows: rows computed together;
    dtype: how its floating-point tensors of more than one axis are stored; row_bytes: about what a row takes, where
    that is known, which keeps shards to 256 MB.
    """

    name: str
    meta: Mapping[str, Any]
    group_rows: int = 64
    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    row_bytes: int = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


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

    labels: int64 [R]; source_hashes: sha256 hexadecimal [R]; source_names: [R]; class_names; meta: plain values about
    the rows, "image_shape" [C, H, W], "model" (the model's digest), "fit" (how images became that shape); parts: what
    is stored of each row, none for a bank without inversion, which alone may have no rows. A shard has `shard_rows`
    rows (rounded down to whole groups, at least one); the last may have fewer. perceptual_hashes: V32 [R] of
    `streamaug.data.perceptual`, for finding near-duplicates of the sources, or None.
    """

    labels: np.ndarray
    source_hashes: Sequence[str]
    source_names: Sequence[str]
    class_names: Sequence[str]
    meta: Mapping[str, Any]
    parts: Sequence[Part]
    shard_rows: int = 4096
    perceptual_hashes: np.ndarray | None = None
    _layouts: dict[str, "Layout"] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        names = [part.name for part in self.parts]
        for name in names:
            if not _PART_NAME.fullmatch(name) or name in _RESERVED or names.count(name) > 1:
                raise BankError(
                    f"part '{name}': a part's name is given once, has small letters, digits and underscores, and is "
                    f"not {' or '.join(_RESERVED)}"
                )

    @property
    def num_rows(self) -> int:
        return len(self.labels)

    def part(self, name: str) -> Part:
        """The part of this name. Raises BankError when the plan has none."""
        for part in self.parts:
            if part.name == name:
                return part
        raise BankError(
            f"no part '{name}' in this bank; it has {', '.join(part.name for part in self.parts) or 'none'}"
        )

    def groups(self, part: str) -> list[Group]:
        """The part's groups, in the order of the rows."""
        return self.layout(part).groups

    def layout(self, part: str) -> "Layout":
        """How the rows of a part are divided into groups and files."""
        if part not in self._layouts:
            self._layouts[part] = Layout(self, self.part(part))
        return self._layouts[part]

    @cached_property
    def row_tensors(self) -> dict[str, torch.Tensor]:
        """What the rows file holds: label, hashes and source name of every row."""
        names = [name.encode("utf-8", "surrogateescape") for name in self.source_names]
        paths = b"".join(path_hash(name) for name in self.source_names)
        tensors = {
            "label": torch.from_numpy(np.asarray(self.labels, dtype=np.int64)),
            "source_hash": _bytes(bytes.fromhex("".join(self.source_hashes))).reshape(-1, 32),
            "path_hash": _bytes(paths).reshape(-1, 16),
            "source_names": _bytes(b"".join(names)),
            "source_name_end": torch.from_numpy(np.cumsum([len(name) for name in names], dtype=np.int64)),
        }
        if self.perceptual_hashes is not None:
            width = self.perceptual_hashes.dtype.itemsize
            tensors["perceptual_hash"] = _bytes(self.perceptual_hashes.tobytes()).reshape(-1, width)
        return tensors

    @cached_property
    def rows_fingerprint(self) -> str:
        """Hash of the rows file's contents."""
        return rows_fingerprint(self.row_tensors)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything here: a bank with this fingerprint is what the plan asks for."""
        parts = [[part.name, dict(part.meta), self.layout(part.name).shard_names] for part in self.parts]
        return hash_of(parts, self.rows_fingerprint, list(self.class_names), dict(self.meta))


class Layout:
    """One part's groups and shards, and the fingerprints that name them."""

    def __init__(self, plan: BankPlan, part: Part):
        self._plan = plan
        self._part = part

    @cached_property
    def groups(self) -> list[Group]:
        size = self._part.group_rows
        rows = np.arange(self._plan.num_rows, dtype=np.int64)
        members = [rows[start : start + size] for start in range(0, len(rows), size)]
        return [
            Group(number, group, np.pad(group, (0, size - len(group)), mode="edge"))
            for number, group in enumerate(members)
        ]

    @cached_property
    def shards(self) -> list[list[Group]]:
        return [
            self.groups[start : start + self.shard_groups] for start in range(0, len(self.groups), self.shard_groups)
        ]

    @property
    def shard_groups(self) -> int:
        """Groups in a full shard."""
        rows = min(self._plan.shard_rows, _SHARD_BYTES // max(self._part.row_bytes, 1))
        return max(rows // self._part.group_rows, 1)

    @cached_property
    def fingerprints(self) -> list[str]:
        """Hash of all that each group's tensors depend on."""
        plan, part = self._plan, self._part
        shared = {
            "version": VERSION,
            "part": part.name,
            "meta": dict(part.meta),
            "dtype": part.dtype,
            "group_rows": part.group_rows,
            "image_shape": plan.meta.get("image_shape"),
        }
        labels = np.asarray(plan.labels).tolist()
        return [
            hash_of(shared, group.number, [(plan.source_hashes[row], labels[row]) for row in group.rows.tolist()])
            for group in self.groups
        ]

    @cached_property
    def shard_names(self) -> list[str]:
        """File name of each shard: it changes with what the shard's groups depend on."""
        hashes = [hash_of([self.fingerprints[group.number] for group in groups]) for groups in self.shards]
        return [f"{self._part.name}-{number:05d}-{digest}.safetensors" for number, digest in enumerate(hashes)]


def rows_fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hash of a rows file's contents, which names the file."""
    return hash_of({name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()})


def hash_of(*values: Any) -> str:
    """64 bits of the sha256 of plain values, in hexadecimal."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _bytes(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())

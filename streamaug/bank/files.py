"""A bank's files: atomic writing, the index, and safetensors shards that list the groups they hold."""

import hashlib
import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from streamaug.errors import BankError, BankWriteError

FORMAT = "streamaug-bank"
VERSION = 2
INDEX = "index.json"
LOCK = ".bank-lock"
WORK = ".bank-work"

_DATA_FILE = re.compile(r"[a-z][a-z0-9_]*(-\d{5,})?-[0-9a-f]{16}\.safetensors")

# The only metadata key of a shard: safetensors does not fix the order of several.
_HEADER = "streamaug"


def write_atomically(file: Path, data: bytes, work: Path) -> None:
    """Make `file` hold `data` or stay as it was; on return it survives a crash.

    work: folder of the same file system, for the temporary file. Raises BankError.
    """
    temporary = work / "writing"
    try:
        with open(temporary, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise BankWriteError(
            f"{file}: cannot be written: {error.strerror} ({len(data) / 1e3:.0f} kB needed); what was "
            "finished is intact: make room and start again to go on from there"
        ) from None


def shard_bytes(tensors: dict[str, torch.Tensor], groups: list[tuple[str, int]]) -> bytes:
    """A safetensors file that lists its groups as (fingerprint, rows)."""
    return save(tensors, metadata={_HEADER: json.dumps({"groups": groups})})


def load_shard(file: Path) -> dict[str, torch.Tensor]:
    """The file's tensors, memory-mapped (private: writing to them does not reach the file)."""
    with safe_open(file, "pt") as shard:
        return {name: shard.get_tensor(name) for name in sorted(shard.keys())}


def groups_in(file: Path) -> list[tuple[str, int]]:
    """The groups a shard lists; none when it is missing, truncated or something else."""
    try:
        with safe_open(file, "pt") as shard:
            groups = json.loads((shard.metadata() or {})[_HEADER])["groups"]
    except (OSError, SafetensorError, KeyError, ValueError):
        return []
    return [(fingerprint, rows) for fingerprint, rows in groups]


def file_entry(file: Path, rows: int, sha256: str | None = None) -> dict[str, Any]:
    """How the index names a file; the checksum is computed unless it is known."""
    return {
        "file": file.name,
        "rows": rows,
        "bytes": file.stat().st_size,
        "sha256": sha256 or sha256_of(file),
    }


def file_entries(index: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of all files that an index names: the rows file, then each part's shards."""
    return [index["rows"], *(entry for part in index["parts"] for entry in part["shards"])]


def data_files(folder: Path) -> list[Path]:
    """The rows files and shards in a bank's folder, those that no index names included, sorted."""
    return sorted(file for file in folder.glob("*.safetensors") if _DATA_FILE.fullmatch(file.name))


def sha256_of(file: Path) -> str:
    with open(file, "rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def path_hash(name: str) -> bytes:
    """16 bytes that stand for a source's name: the names themselves are only mapped."""
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:16]


def seal(index: dict[str, Any]) -> bytes:
    """The index file's bytes: the index and its own checksum."""
    return (json.dumps(index | {"checksum": _checksum(index)}, indent=1, sort_keys=True) + "\n").encode()


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a bank folder. Raises BankError when it is missing, damaged or of another format version."""
    file = folder / INDEX
    try:
        text = file.read_bytes()
    except FileNotFoundError:
        if (folder / WORK).is_dir():
            raise BankError(
                f"{folder}: an unfinished bank: run `streamaug invert` again, or the `streamaug bank` verb that was "
                "writing it: it goes on from there"
            ) from None
        raise BankError(f"{folder}: not a latent bank (no {INDEX}); `streamaug invert` makes one") from None
    except NotADirectoryError:
        raise BankError(f"{folder}: a file; a latent bank is a folder with an {INDEX}") from None
    except OSError as error:
        raise BankError(f"{file}: cannot be read: {error.strerror}") from None
    index = _parse(text)
    if index is None:
        raise BankError(f"{file}: not the index of a latent bank, or damaged; run `streamaug invert` again")
    _refuse_version(folder, index)
    if index.pop("checksum", None) != _checksum(index):
        raise BankError(f"{file}: its checksum does not fit its contents; run `streamaug invert` again to restore it")
    return index


def refuse_foreign(folder: Path) -> None:
    """Raise BankError when a folder holds something that a writer must leave alone."""
    if folder.exists() and not folder.is_dir():
        raise BankError(f"{folder}: a file; a latent bank is a folder: set bank.path to another path")
    try:
        names = sorted(entry.name for entry in folder.iterdir())
        index = _parse((folder / INDEX).read_bytes()) if INDEX in names else None
    except OSError:
        return
    if index is not None:
        _refuse_version(folder, index)
    elif names and not {LOCK, WORK} & set(names):
        raise BankError(
            f"{folder}: holds files that are not a bank's ({', '.join(names[:5])}); set bank.path to a new folder"
        )


def _refuse_version(folder: Path, index: dict[str, Any]) -> None:
    if index["version"] == VERSION:
        return
    if isinstance(index["version"], int) and index["version"] < VERSION:
        remedy = "delete the folder and run `streamaug invert` again, or set bank.path to another folder"
    else:
        remedy = "upgrade streamaug, or set bank.path to another folder"
    raise BankError(
        f"{folder}: written in bank format {index['version']}, this streamaug knows format {VERSION}: {remedy}"
    )


def _parse(text: bytes) -> dict[str, Any] | None:
    """The index, of whatever version, or None when the text is something else."""
    try:
        index = json.loads(text)
    except ValueError:
        return None
    ours = isinstance(index, dict) and index.get("format") == FORMAT and "version" in index
    return index if ours else None


def _checksum(index: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()

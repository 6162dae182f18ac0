"""A loader's state in a framework's checkpoint folder: one file a rank, read without unpickling objects."""

import os
from pathlib import Path
from typing import Any

import torch

from streamaug.errors import StateError
from streamaug.loader.ranks import RANKS_KEY


def save_state(loader: Any, folder: str | os.PathLike, name: str, **others: int) -> None:
    """Write this rank's state, and `others` beside it; every rank does so for itself."""
    file = _file(folder, name, loader.stream.rank)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    torch.save(loader.state_dict() | others | {RANKS_KEY: loader.stream.world_size}, partial)
    os.replace(partial, file)


def load_state(loader: Any, folder: str | os.PathLike, name: str) -> dict[str, Any]:
    """What was saved by another number of ranks is shared out, each rank then reading all files.

    Returns one rank's file, with the number of ranks under RANKS_KEY. Raises StateError when the checkpoint has no
    state of this loader, or one that cannot be shared out.
    """
    rank, ranks = loader.stream.rank, loader.stream.world_size
    first_file = _file(folder, name, 0)  # not in the folder of another machine that keeps its own
    first = _read(first_file if first_file.exists() else _file(folder, name, rank))
    saved = first[RANKS_KEY]  # there may be files of more ranks, left of an earlier checkpoint
    states = [_read(_file(folder, name, one)) for one in ([rank] if saved == ranks else range(saved))]
    for state in states:
        del state[RANKS_KEY]
    loader.load_state_dict(states[0] if saved == ranks else {RANKS_KEY: states})
    return first


def _read(file: Path) -> dict[str, Any]:
    if not file.exists():
        raise StateError(
            f"{file.parent} has no {file.name}: the checkpoint was saved without this StreamLoader; resume it with "
            "what it was saved with, or load the model alone and start anew"
        )
    return torch.load(file, map_location="cpu", weights_only=True)


def _file(folder: str | os.PathLike, name: str, rank: int) -> Path:
    return Path(folder) / f"{name}_rank{rank}.pt"

"""A loader's state in a framework's checkpoint folder: one file a rank, read without unpickling objects."""

import os
from pathlib import Path
from typing import Any

import torch

from streamaug.errors import StateError
from streamaug.loader.ranks import RANKS_KEY


def save_state(loader: Any, folder: str | os.PathLike, name: str) -> None:
    """Write this rank's state; every rank does so for itself."""
    file = _file(folder, name, loader.stream.rank)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    torch.save(loader.state_dict() | {RANKS_KEY: loader.stream.world_size}, partial)
    os.replace(partial, file)


def load_state(loader: Any, folder: str | os.PathLike, name: str, *, same_ranks_because: str | None = None) -> None:
    """What was saved by another number of ranks is shared out, each rank then reading all files, unless
    `same_ranks_because` says why it cannot be.

    Raises StateError when the checkpoint has no state of this loader, or cannot be shared out.
    """
    rank, ranks = loader.stream.rank, loader.stream.world_size
    own = _file(folder, name, rank)
    state = _read(own if own.exists() else _file(folder, name, 0))
    saved = state.pop(RANKS_KEY)
    if saved == ranks:
        loader.load_state_dict(state)
        return
    if same_ranks_because is not None:
        raise StateError(
            f"{folder} was saved by {saved} ranks and is loaded by {ranks}: {same_ranks_because}; start {saved} ranks"
        )
    states = [_read(_file(folder, name, one)) for one in range(saved)]
    for state in states:
        del state[RANKS_KEY]
    loader.load_state_dict({RANKS_KEY: states})


def _read(file: Path) -> dict[str, Any]:
    if not file.exists():
        raise StateError(
            f"{file.parent} has no {file.name}: the checkpoint was saved without this StreamLoader; resume it with "
            "what it was saved with, or load the model alone and start anew"
        )
    return torch.load(file, map_location="cpu", weights_only=True)


def _file(folder: str | os.PathLike, name: str, rank: int) -> Path:
    return Path(folder) / f"{name}_rank{rank}.pt"

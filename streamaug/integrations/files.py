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


def load_state(loader: Any, folder: str | os.PathLike, name: str) -> None:
    """Raises StateError when the checkpoint has no state of this loader, or was saved by another number of ranks."""
    file = _file(folder, name, loader.stream.rank)
    if not file.exists():
        raise StateError(
            f"{folder} has no {file.name}: the checkpoint was saved without this StreamLoader, or by fewer ranks; "
            "resume it with what it was saved with, or load the model alone and start anew"
        )
    state = torch.load(file, map_location="cpu", weights_only=True)
    saved = state.pop(RANKS_KEY)
    if saved != loader.stream.world_size:
        raise StateError(f"{folder} was saved by {saved} ranks and is loaded by {loader.stream.world_size}")
    loader.load_state_dict(state)


def _file(folder: str | os.PathLike, name: str, rank: int) -> Path:
    return Path(folder) / f"{name}_rank{rank}.pt"

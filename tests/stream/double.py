"""A double of `streamaug.stream.ring.cuda.Cuda`, GPUs whose memory is files that processes share, and an engine for it.

STREAMAUG_DOUBLE names the folder. `gpus.json` in it says what there is; `calls` is what was asked of it, by whom.
Images are arrays unless `tensors` is set: importing torch takes a producer seconds.
"""

import contextlib
import json
import mmap
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from streamaug.orders import OrderBatch
from streamaug.stream.hashing import HashEngine
from streamaug.stream.ring import Slot
from streamaug.stream.ring.cuda import CudaError
from streamaug.stream.ring.emission import Emission

UUIDS = ["11111111-aaaa", "22222222-bbbb", "33333333-cccc"]


def lay_out(folder: Path, **machine: object) -> None:
    """gpus: how many; peers: whether they reach each other; free: bytes on each; refuse: calls that fail."""
    usual = {"gpus": 1, "peers": True, "free": 1 << 30, "refuse": [], "tensors": False}
    (folder / "gpus.json").write_text(json.dumps(usual | machine))
    (folder / "calls").touch()


def calls(folder: Path) -> list[tuple[int, str, str]]:
    """(process, call, argument) in the order they were made."""
    lines = (folder / "calls").read_text().splitlines()
    return [(int(pid), name, argument) for pid, name, argument in (line.split(" ", 2) for line in lines)]


class DoubleEvent:
    def __init__(self, queries: int):
        self.left = queries

    def query(self) -> bool:
        self.left -= 1
        return self.left < 0


class DoubleCuda:
    def __init__(self) -> None:
        self.folder = Path(os.environ["STREAMAUG_DOUBLE"])
        self.machine = json.loads((self.folder / "gpus.json").read_text())
        self.blocks: dict[int, tuple[mmap.mmap, Path]] = {}

    def _log(self, name: str, argument: object = "") -> None:
        with open(self.folder / "calls", "a") as file:
            file.write(f"{os.getpid()} {name} {argument}\n")
        if name in self.machine["refuse"]:
            raise CudaError(f"{name}: not permitted (CUDA error 800)")

    def _visible(self) -> list[int]:
        setting = os.environ.get("CUDA_VISIBLE_DEVICES")
        return list(range(self.machine["gpus"])) if setting is None else [int(at) for at in setting.split(",") if at]

    def count(self) -> int:
        return len(self._visible())

    def index(self, device: str) -> int:
        return int(device.partition(":")[2] or 0)

    def uuid(self, index: int) -> str:
        return UUIDS[self._visible()[index]]

    def can_access(self, index: int, peer: int) -> bool:
        return index == peer or self.machine["peers"]

    def free_nbytes(self, index: int) -> int:
        return self.machine["free"]

    def allocate(self, index: int, nbytes: int) -> int:
        self._log("allocate", self.uuid(index))
        fd, path = tempfile.mkstemp(prefix="memory-", dir=self.folder)
        os.truncate(fd, nbytes)
        os.close(fd)
        return self._map(Path(path))

    def _map(self, path: Path) -> int:
        with open(path, "r+b") as file:
            pointer = (len(self.blocks) + 1) << 32
            self.blocks[pointer] = mmap.mmap(file.fileno(), 0), path
        return pointer

    def free(self, index: int, pointer: int) -> None:
        self._log("free", self.uuid(index))
        self.blocks.pop(pointer)[1].unlink()

    def export(self, index: int, pointer: int) -> bytes:
        return str(self.blocks[pointer][1]).encode()

    def open(self, index: int, handle: bytes) -> int:
        self._log("open", self.uuid(index))
        return self._map(Path(handle.decode()))

    def close(self, index: int, pointer: int) -> None:
        self._log("close", self.uuid(index))
        del self.blocks[pointer]

    def tensor(self, index: int, pointer: int, shape: tuple[int, ...]) -> Any:
        base = pointer >> 32 << 32
        flat = np.frombuffer(self.blocks[base][0], np.uint8, int(np.prod(shape)), pointer - base)
        if not self.machine["tensors"]:
            return flat.reshape(shape)
        import torch

        return torch.from_numpy(flat.reshape(shape))

    def empty(self, index: int, shape: tuple[int, ...]) -> Any:
        if not self.machine["tensors"]:
            return np.empty(shape, np.uint8)
        import torch

        return torch.empty(shape, dtype=torch.uint8)

    def register(self, address: int, nbytes: int) -> None:
        self._log("register", nbytes)

    def unregister(self, address: int) -> None:
        self._log("unregister")

    def record(self, index: int) -> DoubleEvent:
        return DoubleEvent(queries=3)

    @contextlib.contextmanager
    def stream(self, index: int, *, foreground: bool):
        self._log("stream", "foreground" if foreground else "background")
        yield


class EmittingEngine(HashEngine):
    """Makes what a HashEngine makes, and hands it over as an engine on a GPU does."""

    def make(self, order: OrderBatch, slot: Slot) -> Emission:  # type: ignore[override]
        import torch

        size = len(order)
        made = _Scratch(slot, size, self.image_shape)
        count = super().make(order, made)  # type: ignore[arg-type]
        source, scores = torch.full((size,), -1), torch.zeros(size)
        source[:count] = torch.from_numpy(made.source[:count])
        scores[source[:count]] = torch.from_numpy(made.scores[:count])
        return Emission(
            order,
            slot,
            torch.from_numpy(made.images),
            source=source,
            count=torch.tensor([count]),
            reasons=torch.from_numpy(made.reasons),
            scores=scores,
        )


class _Scratch:
    """A slot of this process alone."""

    def __init__(self, slot: Slot, size: int, image_shape: tuple[int, int, int]):
        self.beat = slot.beat
        self.images = np.zeros((size, *image_shape), np.uint8)
        self.ids, self.labels, self.source = np.zeros((3, size), np.int64)
        self.scores = np.zeros(size, np.float32)
        self.reasons = np.zeros(size, np.uint8)


def build(options: dict) -> EmittingEngine:
    return EmittingEngine(options)

"""Where a producer keeps the bank: in its memory-mapped files, in memory, or in the GPU's memory."""

import logging
import math
from collections.abc import Iterable
from typing import Literal

import numpy as np
import torch

from streamaug.bank import LatentBank
from streamaug.errors import BankError, ConfigError

log = logging.getLogger("streamaug")

Residence = Literal["mapped", "memory", "cuda"]

_MEMORY_BYTES = 2**28  # on a CPU, as fp32: more is left to the page cache
_GPU_SHARE = 8  # on a GPU, at most one part in so many of its memory


def decide(setting: str, bank: LatentBank, names: Iterable[str], device: torch.device) -> Residence:
    """What `bank.device` means for these tensors of the bank; "auto" is the fastest that has room.

    The answer depends on sizes alone, not on what is free at the moment, so that it is the same after a restart.
    Raises ConfigError for "cuda" without a GPU.
    """
    wanted = set(names)
    forms = [form for part in bank.index["parts"] for name, form in part["tensors"].items() if name in wanted]
    elements = [bank.num_rows * math.prod(form["shape"]) for form in forms]
    stored = sum(n * getattr(torch, form["dtype"]).itemsize for n, form in zip(elements, forms, strict=True))
    as_fp32 = 4 * sum(elements)
    if setting == "cuda" and device.type != "cuda":
        raise ConfigError(f"bank.device is cuda and the model runs on {device}; accepted there: auto, mapped, memory")
    found: Residence
    if setting != "auto":
        found = setting  # type: ignore[assignment]
    elif device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        found = "cuda" if stored <= total // _GPU_SHARE else "memory" if stored <= _MEMORY_BYTES else "mapped"
    else:
        found = "memory" if as_fp32 <= _MEMORY_BYTES else "mapped"
    size = as_fp32 if found == "memory" and device.type == "cpu" else stored
    where = {"mapped": "memory-mapped", "memory": "in memory", "cuda": f"on {device}"}[found]
    log.info("bank: %d rows, %.3g MB, %s", bank.num_rows, size / 1e6, where)
    return found


class Rows:
    """Access to a bank's rows for mixing, from wherever they are kept; a tensor is brought there at its first use."""

    def __init__(self, bank: LatentBank, device: torch.device, residence: Residence = "mapped"):
        self.bank, self.device, self.residence = bank, device, residence
        self._kept: dict[str, torch.Tensor] = {}

    def gather(
        self, name: str, row_a: np.ndarray, row_b: np.ndarray, shape: tuple[int, ...] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A tensor that holds at least the rows asked for, [n, ...], and where a and b are in it, int64 [B], -1: none.

        row_a, row_b: int64 [B], bank rows, -1 for none. shape: of a row, where no order may have one; without it that
        is refused. All on the device. Raises BankError.
        """
        if not (row_a >= 0).any() and not (row_b >= 0).any():
            if shape is None:
                raise BankError(
                    "a recipe conditioned on inverted embeddings needs anchors: use kind embedding or noise"
                )
            return torch.zeros((1, *shape), device=self.device), self._index(row_a), self._index(row_b)
        if self.residence == "mapped" or (self.residence == "memory" and self.device.type == "cuda"):
            return self._each_once(name, row_a, row_b)
        highest = max(int(row_a.max()), int(row_b.max()))
        if highest >= self.bank.num_rows:
            raise BankError(f"{self.bank.path}: row {highest} asked for, the bank has 0 to {self.bank.num_rows - 1}")
        return self._tensor(name), self._index(row_a), self._index(row_b)

    def _each_once(
        self, name: str, row_a: np.ndarray, row_b: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        used, inverse = np.unique(np.stack([row_a, row_b]), return_inverse=True)
        # np.unique sorts, so a missing row (-1) comes first: leave it out and let the others move down.
        missing = int(used[0] == -1)
        a, b = (self._index(part.astype(np.int64) - missing) for part in inverse.reshape(2, -1))
        if self.residence == "mapped":
            return self.bank.gather(name, used[missing:]).to(self.device), a, b
        pinned = self._tensor(name)
        rows = torch.empty((len(used) - missing, *pinned.shape[1:]), dtype=pinned.dtype, pin_memory=True)
        torch.index_select(pinned, 0, torch.from_numpy(used[missing:]), out=rows)
        return rows.to(self.device, non_blocking=True), a, b

    def _tensor(self, name: str) -> torch.Tensor:
        if name not in self._kept:
            tensor = self.bank.tensor(name)
            if self.residence == "cuda":
                tensor = tensor.to(self.device)
            elif self.device.type == "cuda":
                tensor = tensor.pin_memory()
            else:
                # `perturb` is one pass over fp32 rows on a CPU, and three over others.
                tensor = tensor.to(torch.float32, copy=True)
            self._kept[name] = tensor
        return self._kept[name]

    def _index(self, rows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(rows, dtype=np.int64)).to(self.device)

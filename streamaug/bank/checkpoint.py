"""The progress of a group that takes long to compute, kept so that an interruption costs little of it."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from streamaug.bank.files import write_atomically


class Checkpoint:
    """Tensors of an unfinished group: what was saved last, or nothing.

    It is named by the group's fingerprint, so what other images, another model or other settings left is never
    loaded. `Checkpoint(None)` keeps nothing, for a group that is computed to be measured or tested.
    """

    def __init__(self, file: Path | None):
        """Use `BankWriter.checkpoint`. file: where the tensors are kept, in a folder that exists."""
        self._file = file
        self.on_share: Callable[[float], None] = lambda share: None

    def reached(self, share: float) -> None:
        """Tell whoever set `on_share` how much of the group is done, in [0, 1]."""
        self.on_share(share)

    def load(self) -> dict[str, torch.Tensor] | None:
        """The tensors saved last, on the CPU; None when there are none, or they are damaged."""
        if self._file is None:
            return None
        try:
            return load(self._file.read_bytes())
        except (OSError, SafetensorError):
            return None

    def save(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep these tensors instead of those saved before; on return they survive a crash.

        Raises BankError when the disk is full; what was saved before is intact.
        """
        if self._file is not None:
            copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
            write_atomically(self._file, save(copies), self._file.parent)

    def remove(self) -> None:
        """Forget what was saved."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)

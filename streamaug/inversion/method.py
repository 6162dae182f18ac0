"""What an inversion method is: named settings, and a function from a group of images to the tensors the bank stores."""

from typing import Protocol

import numpy as np
import torch

from streamaug.bank import Checkpoint, Part


class Method(Protocol):
    """One way to turn images into bank rows.

    part: the name, and all that its tensors depend on besides images and labels. Weights are read at the first
    `compute`: a bank that is complete needs none.
    """

    @property
    def part(self) -> Part: ...

    def compute(
        self, images: np.ndarray, labels: np.ndarray, rows: np.ndarray, checkpoint: Checkpoint
    ) -> dict[str, torch.Tensor]:
        """The part's tensors [G, ...] by name; those [G], with a dot in their name, are row arrays.

        images: uint8 [G, C, H, W]; labels: int64 [G]; rows: int64 [G], which bank rows these are. G is
        `part.group_rows`: the last row is repeated to fill a group. checkpoint: where a long group may keep its
        progress.
        """
        ...

"""An engine that draws from every library's own random numbers, as none should."""

import random

import numpy as np

from streamaug.stream.hashing import HashEngine

PRELOAD = ("torch",)


class Drawing(HashEngine):
    """The rows of an image's 64 pixels: random, numpy, torch, and Python's hashes of strings."""

    def __init__(self, options: dict):
        super().__init__(options)
        import torch

        self._torch = torch

    def make(self, order, slot) -> int:
        count = super().make(order, slot)
        torch_draws = self._torch.randint(0, 256, (16,)).numpy()
        rows = [
            [random.randrange(256) for _ in range(16)],
            np.random.randint(0, 256, 16),
            torch_draws,
            [hash(f"name {n}") % 256 for n in range(16)],
        ]
        slot.images[:] = np.array(rows, np.uint8).reshape(1, 1, 8, 8)
        return count


def build(options: dict) -> Drawing:
    return Drawing(options)

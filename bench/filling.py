"""An engine without a model for the hand-off's figures: it fills batches on the host, or on a GPU as real ones do."""

import time

import numpy as np

from streamaug.orders import OrderBatch
from streamaug.stream.engine import Engine
from streamaug.stream.hashing import FillEngine
from streamaug.stream.ring import STAGES, Slot
from streamaug.stream.ring.emission import Emission


class HostFill(FillEngine):
    """Options: image_shape; seconds: what a batch takes besides being filled."""

    def __init__(self, options: dict):
        super().__init__(options)
        self._seconds = options["seconds"]

    def make(self, order: OrderBatch, slot: Slot) -> int:
        time.sleep(self._seconds)
        return super().make(order, slot)


class DeviceFill:
    """Queues what it does on the device and waits for nothing. Options: besides HostFill's, batch_size and device."""

    def __init__(self, options: dict):
        import torch

        size, device = options["batch_size"], options["device"]
        self.image_shape = tuple(options["image_shape"])
        self.stage_seconds = dict.fromkeys(STAGES, 0.0)
        self._seconds = options["seconds"]
        self._images = torch.empty((size, *self.image_shape), dtype=torch.uint8, device=device)
        self._told = {
            "source": torch.arange(size, device=device),
            "count": torch.full((1,), size, device=device),
            "reasons": torch.zeros(size, dtype=torch.uint8, device=device),
            "scores": torch.ones(size, device=device),
        }

    def load_judge(self, version: int, state: np.ndarray) -> None:
        pass

    def make(self, order: OrderBatch, slot: Slot) -> Emission:
        time.sleep(self._seconds)
        images = self._images if isinstance(slot.images, np.ndarray) else slot.images
        images.fill_(order.k % 251)
        return Emission(order, slot, images, **self._told)


def build(options: dict) -> Engine:
    return HostFill(options) if options["device"] == "cpu" else DeviceFill(options)

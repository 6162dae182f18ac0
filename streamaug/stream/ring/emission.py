"""The end of a batch on a GPU: what the host must know of it, on its way there while nobody waits for the device."""

import time
from typing import Any

import numpy as np

from streamaug.orders import OrderBatch
from streamaug.stream.ring import Slot
from streamaug.stream.ring.cuda import Event, connect


class Emission:
    """What `Engine.make` may return instead of a count. The producer publishes the slot once `done` is true.

    Copies are queued behind the kernels that make the batch, into pinned memory, and an event behind them: nothing
    synchronises the device.
    """

    def __init__(
        self, order: OrderBatch, slot: Slot, images: Any, *, source: Any, count: Any, reasons: Any, scores: Any
    ):
        """Tensors on one GPU. images: uint8 [B, C, H, W], accepted ones in front, or `slot.images` itself; source:
        int64 [B]; count: int64 [1] (both as `kernels.emit` returns them); reasons: uint8 [B]; scores: float [B].
        """
        import torch

        self._order, self._slot = order, slot
        if images is not slot.images:
            there = torch.from_numpy(slot.images) if isinstance(slot.images, np.ndarray) else slot.images
            there.copy_(images, non_blocking=True)
        self._kept = images  # until the device has read it

        def on_its_way(values: Any) -> Any:
            there = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
            return there.copy_(values, non_blocking=True)

        self._arriving = [on_its_way(values) for values in (count, source, reasons, scores.float())]
        self._event: Event = connect().record(images.get_device())

    def done(self) -> bool:
        return self._event.query()

    def wait(self) -> int:
        """`complete` once the device is done, for a caller with nothing else to do."""
        while not self.done():
            time.sleep(0.001)
        return self.complete()

    def complete(self) -> int:
        """Fill in the host's share of the slot; returns how many images were accepted."""
        count, source, reasons, scores = (tensor.numpy() for tensor in self._arriving)
        accepted, slot = int(count[0]), self._slot
        at = source[:accepted]
        slot.reasons[:] = reasons
        slot.source[:accepted] = at
        slot.ids[:accepted] = self._order.images["id"][at]
        slot.labels[:accepted] = self._order.images["label"][at]
        slot.scores[:accepted] = scores[at]
        return accepted

"""What a producer runs: the interface between the ring and whatever makes images from orders."""

from typing import TYPE_CHECKING, Protocol

import numpy as np

from streamaug.orders import OrderBatch
from streamaug.stream.ring import Slot

if TYPE_CHECKING:
    from streamaug.stream.ring.emission import Emission


class Engine(Protocol):
    """Makes images from orders. Built in the producer by the function `module:name` with one dict of options.

    `stage_seconds` are running totals of time by stage (perturb, sample, decode, judge, emit).
    """

    image_shape: tuple[int, int, int]
    stage_seconds: dict[str, float]

    def load_judge(self, version: int, state: np.ndarray) -> None:
        """Use this state (uint8, flat) of the live judge from now on."""

    def make(self, order: OrderBatch, slot: Slot) -> "int | Emission":
        """Execute the order: fill the slot (see `Slot`; ids and labels come from the order) and return how
        many images were accepted. What is written may depend on the order and the judge's version only. On a GPU, an
        `Emission` says what is on its way instead: the slot is published when it has arrived.

        Call `slot.beat()` between stages and solver steps: it tells the trainer that work goes on, and raises
        `Abandoned` when nobody wants the batch any more: let that pass.
        """


class Abandoned(Exception):
    """The trainer no longer wants the batch that is being made."""

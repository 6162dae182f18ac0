"""An engine that says how its process came to be, and whose import misbehaves as STARTING says."""

import os
import sys
import threading

from streamaug.orders import OrderBatch
from streamaug.stream.hashing import FillEngine
from streamaug.stream.ring import Slot

PRELOAD = ("colorsys",)
IMPORTED_BY = os.getpid()

if os.environ.get("STARTING") == "thread":
    threading.Thread(target=threading.Event().wait, daemon=True).start()
if os.environ.get("STARTING") == "exit":
    print("no room for me", file=sys.stderr, flush=True)
    os._exit(7)


class TellingEngine(FillEngine):
    """The first two pixels: whether another process imported this module, and whether it imported what it names."""

    def make(self, order: OrderBatch, slot: Slot) -> int:
        count = super().make(order, slot)
        slot.images[:, 0, 0, :2] = [os.getpid() != IMPORTED_BY, "colorsys" in sys.modules]
        return count


def build(options: dict) -> TellingEngine:
    return TellingEngine(options)

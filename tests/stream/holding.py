"""An engine that holds one batch up for as long as a test wants, in whichever process it runs."""

import time
from pathlib import Path

from streamaug.orders import OrderBatch
from streamaug.stream.hashing import HashEngine
from streamaug.stream.ring import Slot

from .fakes import until


class HoldingEngine(HashEngine):
    """Options besides: held, the batch; folder, where a mark in `begun` says that it is in work, and `go` lets it be
    made. Meanwhile it beats, as told by `beat`."""

    def make(self, order: OrderBatch, slot: Slot) -> int:
        if order.k == self.options.get("held"):
            folder = Path(self.options["folder"])
            with open(folder / "begun", "a") as file:
                file.write("!")
            while not (folder / "go").exists():
                if self.options.get("beat", True):
                    slot.beat()
                time.sleep(0.002)
        return super().make(order, slot)


def build(options: dict) -> HoldingEngine:
    return HoldingEngine(options)


class Hold:
    """The test's end of it."""

    def __init__(self, folder: Path, k: int):
        self.folder = folder
        self.engine = f"{__name__}:build"
        self.options = {"held": k, "folder": str(folder)}

    @property
    def begun(self) -> int:
        """How many times the batch was begun."""
        path = self.folder / "begun"
        return len(path.read_text()) if path.exists() else 0

    def await_begin(self) -> None:
        until(lambda: self.begun > 0)

    def end(self) -> None:
        (self.folder / "go").touch()

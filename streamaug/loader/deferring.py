"""`displaced: defer`: real images that had to make room are served first in the next batch, each once an epoch."""

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

from streamaug.loader import batch as batches
from streamaug.loader.batch import Layout
from streamaug.loader.interleave import Share, deferred_split


class Deferred:
    """Real images read and not yet delivered (`waiting`, a batch or None), dealt out in batches of `size`.

    size: images per delivered batch, 0 until the first batch tells.
    """

    def __init__(self, size: int, layout_of: Callable[[Any], Layout]):
        self.size = size
        self.waiting: Any = None
        self._layout_of = layout_of

    def split(self, source: Iterator[Any], share: Share, ratio: Callable[[], Fraction]) -> Iterator[tuple]:
        """(real rows as a batch, their number, synthetic images beside them), until every real image was in one.

        A real batch is read only when fewer than a batch's worth of images wait. `ratio()` is that of the batch at
        hand.
        """
        while True:
            held = batches.count_rows(self.waiting) if self.waiting is not None else 0
            while not self.size or held < self.size:
                batch = next(source, None)
                if batch is None:
                    break
                held += batches.count_rows(batch)
                self.size = self.size or held
                self.waiting = batch if self.waiting is None else self._joined(self.waiting, batch)
            if not held:
                return
            left = held if held < self.size else None
            count, planned = deferred_split(share, self.size, left, ratio())
            front, self.waiting = self.waiting, None
            if count < held:
                front, rest = self._parted(front, count, held)
                self.waiting = batches.rebuild(rest, batches.copied(self._layout_of(rest).rows(rest)), None)
            yield front, count, planned

    def shared_out(self, waiting: Sequence[Any], rank: int, world_size: int) -> tuple[Any, int]:
        """Of what waited on all former ranks: the part of one of `world_size` ranks, as many images on each, and the
        number of images left over."""
        joined = None
        for batch in waiting:
            if batch is not None:
                joined = batch if joined is None else self._joined(joined, batch)
        held = batches.count_rows(joined) if joined is not None else 0
        each = held // world_size
        if not each:
            return None, held
        _, rest = self._parted(joined, rank * each, held)
        part, _ = self._parted(rest, each, held - rank * each)
        return part, held - each * world_size

    def _joined(self, first: Any, second: Any) -> Any:
        layout = self._layout_of(first)
        return batches.rebuild(second, batches.concatenate(layout.rows(first), layout.rows(second)), None)

    def _parted(self, batch: Any, count: int, held: int) -> tuple[Any, Any]:
        rows = self._layout_of(batch).rows(batch)
        front, rest = batches.select(rows, 0, count), batches.select(rows, count, held)
        return batches.rebuild(batch, front, None), batches.rebuild(batch, rest, None)

"""What `Stream.take` returns, and the store of recent images that `starved: reuse` serves again."""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np


@dataclass
class SynthBatch:
    """n synthetic images with where they come from; numpy arrays of their own, shared with nobody.

    images: uint8 [n, C, H, W], with `stream.deliver_on: cuda` a tensor there; labels, label_b: int64 [n]; label_mix:
    float32 [n], the weight of label_b in [0, 1]; ids: int64 [n], unique in a run; scores: float32 [n], from the judge;
    rows: int64 [n], the bank row of the first anchor (-1 for none); starts: int64 [n], the solver step at which the
    image entered the schedule; fresh: bool [n], False for an image that was delivered before.
    """

    images: Any
    labels: np.ndarray
    label_b: np.ndarray
    label_mix: np.ndarray
    ids: np.ndarray
    scores: np.ndarray
    rows: np.ndarray
    starts: np.ndarray
    fresh: np.ndarray

    @classmethod
    def around(cls, images: Any) -> "SynthBatch":
        """Room for what goes with these images."""
        n = len(images)
        return cls(
            images=images,
            labels=np.empty(n, np.int64),
            label_b=np.empty(n, np.int64),
            label_mix=np.empty(n, np.float32),
            ids=np.empty(n, np.int64),
            scores=np.empty(n, np.float32),
            rows=np.empty(n, np.int64),
            starts=np.empty(n, np.int64),
            fresh=np.empty(n, np.bool_),
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, at: slice) -> "SynthBatch":
        """A part of the batch, looking into the same arrays."""
        return SynthBatch(*(getattr(self, field.name)[at] for field in fields(self)))

    def put(self, to: int, other: "SynthBatch", index: np.ndarray | slice = slice(None)) -> int:
        """Copy other[index] to positions `to` and up; returns how many."""
        n = 0
        for field in fields(self):
            source = getattr(other, field.name)[index]
            n = len(source)
            getattr(self, field.name)[to : to + n] = source
        return n


class Recent:
    """The latest delivered images, each to be served again at most `max_reuse` times."""

    def __init__(self, images: Any, max_reuse: int):
        """images: uint8 [capacity, C, H, W], the room for them."""
        capacity = len(images)
        self._store = SynthBatch.around(images)
        self._uses = np.zeros(capacity, np.int64)
        self._added = np.full(capacity, -1, np.int64)  # when, -1 for never
        self._clock = 0
        self._max_reuse = max_reuse
        self._before: tuple[np.ndarray, np.ndarray, int] | None = None  # uses, added and clock as the call began

    def begin(self) -> None:
        """A call of take begins. What was added and served since the last one began is undone unless it was kept."""
        if self._before is not None:
            self._uses, self._added, self._clock = self._before
        self._before = self._uses.copy(), self._added.copy(), self._clock

    def keep(self) -> None:
        """The call delivers what it has."""
        self._before = None

    def add(self, batch: SynthBatch) -> None:
        """Remember fresh images in place of the oldest ones."""
        capacity = len(self._uses)
        for begin in range(0, len(batch), capacity):
            part = batch[begin : begin + capacity]
            at = (self._clock + np.arange(len(part))) % capacity
            self._added[at] = -1
            if self._before is not None:
                self._before[1][at] = -1  # what is written over here does not come back
            for field in fields(part):
                getattr(self._store, field.name)[at] = getattr(part, field.name)
            self._uses[at] = 0
            self._added[at] = self._clock + np.arange(len(part))
            self._clock += len(part)

    def serve(self, to: SynthBatch, begin: int, n: int) -> int:
        """Copy up to n different images to to[begin:], the least used and newest first; returns how many."""
        usable = np.flatnonzero((self._added >= 0) & (self._uses < self._max_reuse))
        order = np.lexsort((-self._added[usable], self._uses[usable]))
        chosen = usable[order[:n]]
        to.put(begin, self._store, chosen)
        to.fresh[begin : begin + len(chosen)] = False
        self._uses[chosen] += 1
        return len(chosen)

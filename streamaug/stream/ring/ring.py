"""The ring between trainer and producer: sequence numbers, slots and judge mailboxes laid out in shared
memory.

The trainer writes an order into a slot and then raises `issued`; the producer fills the slot's images and
then raises `published`. Both numbers only grow, each has one writer, and each is raised after the data it
speaks of: they are the only truth. A slot that was being written when its producer died was never published;
a new producer reads `published` and makes the same order again.
"""

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from streamaug.orders import OrderBatch
from streamaug.stream.ring.memory import Memory

if TYPE_CHECKING:
    from streamaug.stream.ring.cuda import Event
    from streamaug.stream.ring.pixels import Images

STAGES = ("perturb", "sample", "decode", "judge", "emit")
STARTING, READY, FAILED = range(3)

# Header words (int64). The trainer's and the producer's are on cache lines of their own.
_ISSUED, _SKIP_TO, _CLOSING = 0, 1, 2
_PUBLISHED, _BEAT, _SHARERS = 8, 9, 10
_STATE, _READY_NS, _ERROR_NBYTES = 16, 17, 18
_HEADER_NBYTES = 4096
_ERROR_CAPACITY = 65536

# Meta words of a slot (int64).
_COUNT, _ABANDONED, _BEGAN_NS, _ENDED_NS, _FIRST_STAGE = 0, 1, 2, 3, 4
_JUDGE_POST = 15  # the only one the trainer writes
_META_NBYTES = 128


@dataclass(frozen=True)
class Layout:
    """What one ring is made of. `image_shape` is (C, H, W); `slots` is how many batches it can hold; images may live
    apart from the rest, in a GPU's memory."""

    batch_size: int
    image_shape: tuple[int, int, int]
    slots: int
    images_apart: bool = False

    @property
    def images_shape(self) -> tuple[int, ...]:
        """(slots, B, C, H, W)."""
        return (self.slots, self.batch_size, *self.image_shape)

    @property
    def slot_nbytes(self) -> int:
        return self.offsets()["end"]

    @property
    def nbytes(self) -> int:
        return _HEADER_NBYTES + _ERROR_CAPACITY + self.slots * self.slot_nbytes

    def offsets(self) -> dict[str, int]:
        """Byte offset of each field within a slot; images start on a page, the rest on cache lines."""
        size = self.batch_size
        fields = [
            ("meta", _META_NBYTES),
            ("order", OrderBatch.nbytes(size)),
            ("ids", 8 * size),
            ("labels", 8 * size),
            ("source", 8 * size),
            ("scores", 4 * size),
            ("reasons", size),
        ]
        offsets, at = {}, 0
        for name, nbytes in fields:
            offsets[name] = at
            at = _align(at + nbytes, 64)
        offsets["images"] = _align(at, 4096)
        here = 0 if self.images_apart else size * int(np.prod(self.image_shape))
        offsets["end"] = _align(offsets["images"] + here, 4096)
        return offsets


class Slot:
    """Views into one slot. Accepted images are compacted to the front, in the order they were asked for.

    images: uint8 [B, C, H, W], an array, or a tensor where they live in a GPU's memory; ids, labels: int64 [B];
    scores: float32 [B]; source: int64 [B], the position in the order batch of each accepted image; reasons: uint8 [B],
    by position in the order batch, 0 for accepted. Only the first `count` entries of images, ids, labels, scores and
    source mean anything.
    """

    def __init__(self, buffer: memoryview, layout: Layout):
        size, offsets = layout.batch_size, layout.offsets()

        def array(name: str, dtype: type, *shape: int) -> np.ndarray:
            count = int(np.prod(shape))
            return np.frombuffer(buffer, dtype, count=count, offset=offsets[name]).reshape(shape)

        self._meta = array("meta", np.int64, _META_NBYTES // 8)
        self._order = buffer[offsets["order"] : offsets["order"] + OrderBatch.nbytes(size)]
        self._size = size
        self.images: Any = None if layout.images_apart else array("images", np.uint8, size, *layout.image_shape)
        self._copied: Callable[[], Event | None] = _at_once
        self._read: Event | None = None
        self.ids = array("ids", np.int64, size)
        self.labels = array("labels", np.int64, size)
        self.scores = array("scores", np.float32, size)
        self.source = array("source", np.int64, size)
        self.reasons = array("reasons", np.uint8, size)
        self._on_beat: Callable[[], None] | None = None

    def place(self, images: Any, copied: "Callable[[], Event | None]") -> None:
        """The images live in this array or tensor; `copied` gives an event behind a copy out of them, if need be."""
        self.images = images
        self._copied = copied

    def copy_images(self, there: slice, to: Any) -> None:
        """Trainer: copy accepted images to an array, or to a tensor on its GPU, for which nobody waits: the slot is
        `free` again once the GPU has read it."""
        images = self.images[there]
        if isinstance(to, np.ndarray):
            to[...] = images if isinstance(images, np.ndarray) else images.cpu().numpy()
            return
        if isinstance(images, np.ndarray):
            import torch

            images = torch.from_numpy(images)
        to.copy_(images, non_blocking=True)
        self._read = self._copied()

    @property
    def free(self) -> bool:
        """Trainer: whether every copy out of the slot has ended, so that it may be written again."""
        if self._read is not None and self._read.query():
            self._read = None
        return self._read is None

    def beat(self) -> None:
        """Producer: say that work on this batch goes on. Raises Abandoned when nobody wants it any more."""
        if self._on_beat is not None:
            self._on_beat()

    def on_beat(self, call: Callable[[], None] | None) -> None:
        self._on_beat = call

    @property
    def order(self) -> OrderBatch:
        """A copy of the order that the trainer wrote."""
        return OrderBatch.read(self._order, self._size)

    @property
    def judge_post(self) -> int:
        """Which post in the mailboxes holds the judge that the order names."""
        return int(self._meta[_JUDGE_POST])

    def write_order(self, order: OrderBatch, judge_post: int) -> None:
        order.write(self._order)
        self._meta[_JUDGE_POST] = judge_post

    def finish(self, count: int, *, abandoned: bool, began_ns: int, ended_ns: int, stage_ns: list[int]) -> None:
        """Producer: complete the slot, before publishing it."""
        self._meta[:_FIRST_STAGE] = (count, abandoned, began_ns, ended_ns)
        self._meta[_FIRST_STAGE : _FIRST_STAGE + len(STAGES)] = stage_ns

    @property
    def count(self) -> int:
        return int(self._meta[_COUNT])

    @property
    def abandoned(self) -> bool:
        """True when the trainer no longer wanted this batch and nothing was made."""
        return bool(self._meta[_ABANDONED])

    @property
    def span_ns(self) -> tuple[int, int]:
        """When making it began and ended, CLOCK_MONOTONIC nanoseconds."""
        return int(self._meta[_BEGAN_NS]), int(self._meta[_ENDED_NS])

    @property
    def stage_ns(self) -> np.ndarray:
        """int64 [len(STAGES)]: nanoseconds spent in each stage."""
        return self._meta[_FIRST_STAGE : _FIRST_STAGE + len(STAGES)]


class Ring:
    """One producer's ring, seen from either side. Sequence numbers count from 0; number n lives in slot n %
    slots."""

    def __init__(self, memory: Memory, layout: Layout):
        self.layout = layout
        self._words = memory.view[:_HEADER_NBYTES].cast("q")
        self._error = memory.view[_HEADER_NBYTES : _HEADER_NBYTES + _ERROR_CAPACITY]
        first = _HEADER_NBYTES + _ERROR_CAPACITY
        step = layout.slot_nbytes
        self._slots = [
            Slot(memory.view[first + i * step : first + (i + 1) * step], layout) for i in range(layout.slots)
        ]

    def place(self, images: "Images | None") -> None:
        """The images live there, and not simply in the ring's block."""
        if images is not None:
            for at, slot in enumerate(self._slots):
                slot.place(images.of_slot(at, slot.images), images.copied)

    def slot(self, number: int) -> Slot:
        return self._slots[number % self.layout.slots]

    # The trainer's side.

    def issue(self, order: OrderBatch, judge_post: int = 0) -> int:
        """Write the next order and announce it; returns its number. The slot must have been released."""
        number = self.issued
        self.slot(number).write_order(order, judge_post)
        _fence()
        self._words[_ISSUED] = number + 1
        return number

    def skip_to(self, number: int) -> None:
        """Orders below `number` are no longer wanted: the producer passes over them as fast as it can."""
        self._words[_SKIP_TO] = number

    def close(self) -> None:
        """Ask the producer to leave."""
        self._words[_CLOSING] = 1

    def restart(self) -> None:
        """Prepare for a new producer."""
        self._words[_STATE] = STARTING

    def error(self) -> dict:
        """What `fail` wrote: type, message, traceback, and k (None outside a batch)."""
        return json.loads(bytes(self._error[: self._words[_ERROR_NBYTES]]))

    # The producer's side.

    def ready(self, now_ns: int) -> None:
        self._words[_READY_NS] = now_ns
        self._words[_STATE] = READY

    def beat(self, now_ns: int) -> None:
        """Say that work goes on."""
        self._words[_BEAT] = now_ns

    def share(self, rings: int) -> None:
        """Say how many rings the producer serves with the same engine."""
        self._words[_SHARERS] = rings

    def publish(self, number: int) -> None:
        """Announce that slot `number` is complete."""
        _fence()
        self._words[_PUBLISHED] = number + 1

    def fail(self, kind: str, message: str, traceback: str, k: int | None) -> None:
        """Leave an exception for the trainer; of a text that does not fit, the end is kept."""
        room = _ERROR_CAPACITY
        while True:
            report = {"type": kind, "message": message[-room:], "traceback": traceback[-room:], "k": k}
            data = json.dumps(report).encode()
            if len(data) <= _ERROR_CAPACITY:
                break
            room //= 2
        self._error[: len(data)] = data
        self._words[_ERROR_NBYTES] = len(data)
        _fence()
        self._words[_STATE] = FAILED

    # Either side.

    @property
    def issued(self) -> int:
        return self._words[_ISSUED]

    @property
    def published(self) -> int:
        number = self._words[_PUBLISHED]
        _fence()
        return number

    @property
    def skipping_to(self) -> int:
        return self._words[_SKIP_TO]

    @property
    def closing(self) -> bool:
        return self._words[_CLOSING] == 1

    @property
    def state(self) -> int:
        state = self._words[_STATE]
        _fence()
        return state

    @property
    def ready_ns(self) -> int:
        return self._words[_READY_NS]

    @property
    def sharers(self) -> int:
        """How many rings its producer serves, this one included; 1 before it was said."""
        return max(self._words[_SHARERS], 1)

    @property
    def last_beat_ns(self) -> int:
        return self._words[_BEAT]


class Mailboxes:
    """States of the live judge, `count` of them, posted by the trainer and read by every producer.

    Posts have growing numbers. The trainer overwrites only a post that no undelivered order names, so a state
    stays readable for as long as it can be asked for.
    """

    def __init__(self, memory: Memory, count: int, state_nbytes: int):
        self._posts = memory.view[: 8 * count].cast("q")
        first, step = _align(8 * count, 64), _align(state_nbytes, 64)
        self._states = [
            np.frombuffer(memory.view, np.uint8, count=state_nbytes, offset=first + i * step) for i in range(count)
        ]

    @staticmethod
    def nbytes(count: int, state_nbytes: int) -> int:
        return _align(8 * count, 64) + count * _align(state_nbytes, 64)

    def clear(self) -> None:
        for i in range(len(self._posts)):
            self._posts[i] = -1

    def write(self, post: int, state: np.ndarray, keep: set[int]) -> None:
        """Store a state (uint8 [state_nbytes]) in place of a post that is not in `keep`."""
        at = next(i for i, held in enumerate(self._posts) if held not in keep)
        self._posts[at] = -1
        _fence()
        self._states[at][:] = state
        _fence()
        self._posts[at] = post

    def read(self, post: int) -> np.ndarray | None:
        """A copy of that post's state, or None when no mailbox holds it."""
        for at, held in enumerate(self._posts):
            if held == post:
                _fence()
                state = self._states[at].copy()
                _fence()
                return state if self._posts[at] == post else None
        return None


def _at_once() -> None:
    """Copies out of the host's memory have ended when they return."""


def _fence() -> None:
    """Order memory accesses on processors that reorder them: taking a lock twice is a full barrier."""
    lock = threading.Lock()  # its own: a shared one could be held by another thread when the process forks
    with lock:
        pass
    with lock:
        pass


def _align(nbytes: int, to: int) -> int:
    return -(-nbytes // to) * to

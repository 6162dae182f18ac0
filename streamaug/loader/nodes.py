"""The stream as a node of a torchdata graph, and a node that mixes it with real samples in an exact share.

In place of StreamLoader where the real side is a graph of `torchdata.nodes`.
"""

import threading
from collections.abc import Callable, Sequence
from fractions import Fraction
from math import lcm
from typing import TYPE_CHECKING, Any

import torch
from torchdata.nodes import BaseNode

from streamaug.errors import StateError, UsageError
from streamaug.loader.agreement import Agreement
from streamaug.loader.exits import pause_if_leaving
from streamaug.loader.interleave import exact
from streamaug.loader.labels import Labels
from streamaug.loader.position import go_to
from streamaug.loader.transforms import Converter, Normalize

if TYPE_CHECKING:
    from streamaug.stream.stream import Stream

Ratio = float | Callable[[int], float]
_FIX = (
    "StreamNode(stream, like=<a real image>) makes images of the real dtype and range and checks the size; a Mapper on "
    "either side changes the rest; Mix(..., check=False) leaves it as it is"
)


class StreamNode(BaseNode[tuple]):
    """Yields synthetic samples (image, label), or batches of them; the stream is read in one thread at a time.

        node = StreamNode(stream, like=real_image)                   # float32 [C, H, W], int
        node = StreamNode(stream, batch_size=64, epoch_steps=1000)   # float32 [64, C, H, W], int64 [64]

    batch_size: images per item; None yields single samples, read from the stream in its own batch size.
    epoch_steps: items in an epoch; None never ends. A new epoch goes on where the last one ended.
    like: a real image [C, H, W] or batch [n, C, H, W]. Size, dtype and range are compared with it, and the dtype is
        taken from it: with uint8 the pixels come as they were generated, for a transform in a ParallelMapper behind.
        None gives float32 in [0, 1].
    transform: called on each image, uint8 tensor [C, H, W] -> tensor, in `transform_workers` threads. Draws from
        torch's generator inside it are keyed by (seed, rank, reading) and leave the global generator alone.
    normalize: (mean, std) per channel, for pixels in [0, 1], where no transform makes floats.
    classes: names of the real labels in order, where they are ordered differently from the stream's.
    soft_labels: labels as float32 weights [classes], needed for recipes that mix classes.
    with_ids: adds the image's id (an int, or int64 [n]) as a third field.

    The state is the position of the stream and, while samples of a reading are left, that before the reading and the
    place in it: plain numbers and lists. A Prefetcher behind the node saves it as it was when it read ahead: feedback
    given since then is not in it. `reset(None)` begins an epoch and never goes back in the stream.

    Raises UsageError for arguments that cannot be used, MismatchError where the images cannot be like `like`, and
    StateError for a state that it did not save.
    """

    STREAM_KEY = "stream"
    BEFORE_KEY = "before"
    OFFSET_KEY = "offset"
    READING_KEY = "reading"
    YIELDED_KEY = "yielded"

    def __init__(
        self,
        stream: "Stream",
        batch_size: int | None = None,
        *,
        epoch_steps: int | None = None,
        like: torch.Tensor | None = None,
        transform: Callable | None = None,
        normalize: Normalize | None = None,
        classes: Sequence[str] | None = None,
        soft_labels: bool = False,
        with_ids: bool = False,
        seed: int = 0,
        transform_workers: int | None = None,
    ):
        super().__init__()
        if not hasattr(stream, "take"):
            raise UsageError(f"StreamNode(stream): the argument is a Stream, got a {type(stream).__name__}")
        if stream.config.starved == "real":
            raise UsageError(
                "a StreamNode has no real images to fill from (stream.starved: real); set it to wait or reuse"
            )
        self.stream = stream
        self.batch_size = _positive("batch_size", batch_size)
        self.epoch_steps = _positive("epoch_steps", epoch_steps)
        self.with_ids = with_ids
        self.seed = int(seed)
        self._labels = Labels(stream.class_names, classes)
        self._like_labels = torch.empty(0, len(stream.class_names)) if soft_labels else torch.empty(0, dtype=torch.long)
        if like is not None and like.ndim == 3:
            like = like[None]
        self._converter = Converter(
            like, stream.image_shape, transform, from_dataset=False, normalize=normalize, workers=transform_workers
        )
        # Another thread may still be in `next` when a Prefetcher that is reset gave up waiting for it.
        self._lock = threading.RLock()
        self._yielded = 0  # items of this epoch
        self._reading = 0  # calls of take in this run
        self._before: dict[str, Any] = {}  # the stream's state before the samples were read
        self._samples: list[tuple] = []
        self._offset = 0  # samples of them that were yielded

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        super().reset(initial_state)
        with self._lock:
            if initial_state is None:
                self._yielded = 0
                return
            if self.BEFORE_KEY not in initial_state:
                raise StateError(
                    f"a StreamNode's state has {self.BEFORE_KEY!r}, and this one has {', '.join(initial_state)}: "
                    "resume it with the streamaug that saved it, or start the graph anew"
                )
            self._yielded = initial_state[self.YIELDED_KEY]
            self._reading = initial_state[self.READING_KEY]
            self._samples, self._offset = [], 0
            if initial_state[self.BEFORE_KEY] is not None:
                self.stream.load_state_dict(initial_state[self.BEFORE_KEY])
                self._read_samples()
                self._offset = initial_state[self.OFFSET_KEY]
            go_to(self.stream, initial_state[self.STREAM_KEY])

    def next(self) -> tuple:
        pause_if_leaving()
        with self._lock:
            if self._yielded == self.epoch_steps:
                raise StopIteration
            item = self._next_sample() if self.batch_size is None else self._take(self.batch_size)
            self._yielded += 1
            return item

    def get_state(self) -> dict[str, Any]:
        with self._lock:
            between = self._offset == len(self._samples)
            return {
                self.STREAM_KEY: self.stream.state_dict(),
                self.BEFORE_KEY: None if between else self._before,
                self.OFFSET_KEY: 0 if between else self._offset,
                self.READING_KEY: self._reading if between else self._reading - 1,
                self.YIELDED_KEY: self._yielded,
            }

    def _next_sample(self) -> tuple:
        if self._offset == len(self._samples):
            self._read_samples()
        self._offset += 1
        return self._samples[self._offset - 1]

    def _read_samples(self) -> None:
        before = self.stream.state_dict()
        fields = self._take(self.stream.config.batch_size)
        columns = [fields[0].unbind()] + [field.unbind() if field.ndim > 1 else field.tolist() for field in fields[1:]]
        self._before, self._samples, self._offset = before, list(zip(*columns, strict=True)), 0

    def _take(self, count: int) -> tuple[torch.Tensor, ...]:
        synthetic = self.stream.take(count)
        images = self._converter(synthetic.images, (self.seed % 2**64, int(self.stream.rank), self._reading))
        labels = self._labels.encode(synthetic, self._like_labels)
        self._reading += 1
        return (images, labels, torch.from_numpy(synthetic.ids)) if self.with_ids else (images, labels)


class Mix(BaseNode[Any]):
    """Items of a real node with a share of synthetic ones among them, evenly spread and exact over time.

        samples = Mix(real_samples, StreamNode(stream, like=real_image), ratio=0.5)
        loader = torchdata.nodes.Loader(Prefetcher(Mapper(Batcher(samples, 64), default_collate), 4))

    Of any n items in a row the synthetic ones are within one of n × ratio: the remainder is carried, also from epoch
    to epoch, and nothing is drawn. Every real item is delivered once; the epoch ends with the real node. Items are
    passed on as they are, so that samples are mixed before a Batcher; of two nodes that yield batches whole batches
    alternate.

    ratio: the synthetic share in [0, 1), or a function of the number of items delivered in this run. It can be set
        while training. At 0 the stream's node is not touched.
    check: compare the first items of both sides: fields, shapes, dtypes and, over 16 images, the range of the pixels.

    `stream_node` may be a StreamNode or a graph behind one; where it ends it is begun again. `reset(None)` begins an
    epoch of the real node and lets the stream's node go on. Raises MismatchError where both sides differ.

    A torchdata Loader (0.11) that was restored at the end of an epoch reports that end as its state through the whole
    next epoch; with restart_on_stop_iteration=False it does not.
    """

    REAL_KEY = "real"
    STREAM_KEY = "stream"
    OWED_KEY = "owed"
    STEP_KEY = "step"

    def __init__(self, real_node: BaseNode, stream_node: BaseNode, ratio: Ratio = 0.5, *, check: bool = True):
        super().__init__()
        for name, node in (("real_node", real_node), ("stream_node", stream_node)):
            if not isinstance(node, BaseNode):
                raise UsageError(
                    f"{name} is a torchdata.nodes.BaseNode, got a {type(node).__name__}; IterableWrapper and "
                    "MapStyleWrapper make nodes of iterables and datasets, StreamNode of a Stream"
                )
        self.real_node = real_node
        self.stream_node = stream_node
        self.ratio = ratio
        self._agreement = Agreement(_FIX, range_images=16) if check else None
        self._step = 0
        self._stream_begun = self._stream_failed = False
        # Synthetic items owed are owed/whole in [-1/2, 1/2), the ratio is part/whole.
        self._applied: Fraction | None = None
        self._owed, self._part, self._whole = 0, 0, 1

    @property
    def ratio(self) -> Ratio:
        return self._ratio

    @ratio.setter
    def ratio(self, value: Ratio) -> None:
        self._ratio, self._fixed = value, None if callable(value) else exact(value)

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        super().reset(initial_state)
        if initial_state is None:
            self.real_node.reset()
            if not self._stream_begun and self._fixed != 0:
                self._begin_stream()
            return
        self.real_node.reset(initial_state[self.REAL_KEY])
        if initial_state[self.STREAM_KEY] is not None:
            self.stream_node.reset(initial_state[self.STREAM_KEY])
            self._stream_begun = True
        self._step = initial_state[self.STEP_KEY]
        self._owed, self._whole = initial_state[self.OWED_KEY]
        self._applied = None

    def next(self) -> Any:
        pause_if_leaving()
        ratio = self._fixed if self._fixed is not None else exact(self._ratio(self._step))  # type: ignore[operator]
        if ratio is not self._applied:
            self._apply(ratio)
        owed = self._owed + self._part
        synthetic = 2 * owed >= self._whole
        item = self._next_synthetic() if synthetic else next(self.real_node)
        if self._agreement is not None and self._agreement.observe(item, synthetic):
            self._agreement = None
        self._owed = owed - self._whole if synthetic else owed
        self._step += 1
        return item

    def get_state(self) -> dict[str, Any]:
        return {
            self.REAL_KEY: self.real_node.state_dict(),
            self.STREAM_KEY: self.stream_node.state_dict() if self._stream_begun else None,
            self.OWED_KEY: [self._owed, self._whole],
            self.STEP_KEY: self._step,
        }

    def _apply(self, ratio: Fraction) -> None:
        owed = Fraction(self._owed, self._whole)
        self._whole = lcm(owed.denominator, ratio.denominator)
        self._owed = int(owed * self._whole)
        self._part = int(ratio * self._whole)
        self._applied = ratio

    def _begin_stream(self) -> None:
        self.stream_node.reset()
        self._stream_begun = True

    def _next_synthetic(self) -> Any:
        if not self._stream_begun or self._stream_failed:
            self._begin_stream()
        self._stream_failed = True  # a Prefetcher that has raised must be reset before it is read again
        for _ in range(2):
            try:
                item = next(self.stream_node)
            except StopIteration:
                self.stream_node.reset()
            else:
                self._stream_failed = False
                return item
        raise UsageError("the stream's node of this Mix ended twice without an item; without epoch_steps it never ends")


def _positive(name: str, value: int | None) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise UsageError(f"{name} is a whole number from 1, or None, got {value!r}")
    return value

"""A loader that mixes images of a stream with what NVIDIA DALI reads and decodes.

StreamLoader around a DALI iterator mixes as well; this one puts synthetic images through the pipeline's operators, and
its state is exact inside an epoch. Needs the extra `dali`, imported when first used.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from streamaug.errors import StateError, UsageError
from streamaug.loader.agreement import Agreement
from streamaug.loader.dali_source import PixelLayout, Tensors, require_usable, stream_source
from streamaug.loader.position import go_to
from streamaug.loader.stream_loader import Ratio, StreamLoader
from streamaug.stream.batch import SynthBatch

if TYPE_CHECKING:
    from nvidia.dali import Pipeline

    from streamaug.stream.stream import Stream

logger = logging.getLogger("streamaug")

__all__ = ["DALIStreamLoader", "stream_source"]

LastBatch = Literal["partial", "drop", "fill"]


class DALIStreamLoader(StreamLoader):
    """Mixes images of a stream into the batches of a DALI pipeline, through the same augmentation operators.

        @pipeline_def(batch_size=64, num_threads=4, device_id=None, exec_dynamic=False)
        def training(folder, source=None):
            if source is None:
                encoded, labels = fn.readers.file(
                    file_root=folder, random_shuffle=True, pad_last_batch=True, name="reader"
                )
                images = fn.decoders.image(encoded)
            else:
                images, labels = fn.external_source(source=source, num_outputs=2)
            images = fn.resize(images, size=[64, 64])
            return fn.crop_mirror_normalize(images, mirror=fn.random.coin_flip(), dtype=types.FLOAT), labels

        loader = DALIStreamLoader(functools.partial(training, folder), stream, ratio=0.5)
        for batch in loader:
            images, labels = batch[0]["data"], batch[0]["label"]

    It delivers what DALIGenericIterator does: a list with one mapping of tensors. The length is that of an epoch of
    the reader. Shares, modes, `displaced`, the ratio that can be set while training, `stats`, and the state are those
    of StreamLoader, and the arguments not described here as well.

    pipeline: builds a Pipeline that returns images and labels. It is called as pipeline(source=None, ...) for the
        real images and as pipeline(source=source, ...) for the synthetic ones, which come in the pipeline's batch
        size; `...` are enable_checkpointing and checkpoint. Labels of synthetic images are written in the form that
        the real ones leave the pipeline in, whatever the pipeline makes of theirs.
    reader_name: the reader's `name` in the pipeline.
    output_map: names of the images and the labels in the batch.
    last_batch: of an epoch that is no multiple of the batch size: "partial" delivers a short one, "drop" none, "fill"
        a full one, as the reader pads it.
    layout: of the images that the source gives, as the decoder's.
    device: where the source gives them, "cpu", "cuda" or "cuda:1"; it goes with external_source's device "cpu" or
        "gpu". Of external_source(no_copy=True) the batches are kept alive until the pipeline has delivered them.
    checkpointing: keep the state of readers and random operators. False for pipelines with operators that DALI
        cannot save; there is no state then.

    What is saved is exact for what DALI saves: readers (their shuffling and place) and random operators. Loading a
    state builds both pipelines anew. The synthetic images that were augmented and not delivered yet are part of the
    state; those that the pipeline had read ahead are made again. A new ratio by class and feedback act on what the
    pipeline reads next, prefetch_queue_depth of its batches later. An epoch left by `break` is read to its end before
    the next one begins, as DALI cannot go back. After an exception out of a pipeline, such as an interrupted cell of a
    notebook, the pipeline is built anew where it was; with checkpointing=False its random operators begin anew.

    Tested on CPU pipelines only. On a GPU the batch, real or mixed, is where the pipeline's outputs are.
    """

    def __init__(
        self,
        pipeline: Callable[..., "Pipeline"],
        stream: "Stream",
        ratio: Ratio | None = None,
        mode: Literal["replace", "append"] | None = None,
        *,
        displaced: Literal["drop", "defer"] | None = None,
        reader_name: str = "reader",
        output_map: Sequence[str] = ("data", "label"),
        last_batch: LastBatch = "partial",
        layout: PixelLayout = "HWC",
        device: str | torch.device = "cpu",
        checkpointing: bool = True,
        seed: int = 0,
        with_ids: bool = False,
        classes: Sequence[str] | None = None,
    ):
        if not callable(pipeline):
            raise UsageError(
                f"the first argument builds a pipeline, called as pipeline(source=...); got a "
                f"{type(pipeline).__name__}: pass functools.partial(your_pipeline_function, ...)"
            )
        if len(output_map) != 2:
            raise UsageError(f"output_map names the images and the labels, got {list(output_map)}")
        require_usable(stream)
        tensors = Tensors(layout, device)
        names = list(output_map)
        self._images = _RealImages(_Built(pipeline, names, checkpointing), reader_name, last_batch)
        self._augmented = _Augmented(_Built(pipeline, names, checkpointing), stream, tensors, self._images.batch_size)
        super().__init__(
            self._images,
            self._augmented,  # type: ignore[arg-type]
            ratio,
            mode,
            displaced=displaced,
            transform=None,
            seed=seed,
            with_ids=with_ids,
            image_key=names[0],
            label_key=names[1],
            classes=classes,
        )

    def close(self) -> None:
        """End the iteration and both pipelines. The stream stays open."""
        super().close()
        self._images.close()
        self._augmented.close()

    def _make_converter(self, real: torch.Tensor | None, transform: Any, from_dataset: bool) -> Any:
        assert real is not None
        return _AsAugmented(real)


class _AsAugmented:
    """Stands in for a Converter: the images left the pipeline in the real form, which the first ones must prove."""

    seconds = 0.0

    def __init__(self, real: torch.Tensor):
        self._real: torch.Tensor | None = real

    def __call__(self, images: Any, key: tuple[int, ...]) -> torch.Tensor:
        if self._real is not None:
            agreement = Agreement(
                "let the pipeline bring both to one size and dtype: fn.resize, fn.crop_mirror_normalize"
            )
            agreement.observe([self._real], synthetic=False)
            agreement.observe([images], synthetic=True)
            self._real = None
        return images

    def close(self) -> None:
        pass


class _Built:
    """A pipeline and the iterator over it, built anew for each checkpoint.

    interrupted: an exception came out of the pipeline, from a source or from the keyboard, and what DALI had at hand is
    lost to it: build it anew, from `checkpoint()`, which is that before the call.
    """

    def __init__(self, pipeline: Callable[..., "Pipeline"], names: list[str], checkpointing: bool):
        self.names, self.checkpointing = names, checkpointing
        self._pipeline = pipeline
        self.iterator: Any = None
        self.interrupted = False
        self._before: torch.Tensor | None = None  # the checkpoint before the call in progress, or interrupted

    def build(self, source: Any, checkpoint: torch.Tensor | None, **iteration: Any) -> "Pipeline":
        from nvidia.dali.plugin.pytorch import DALIGenericIterator

        self.iterator = None  # ends the threads of the one before
        self.interrupted = False
        saved = None if checkpoint is None else checkpoint.numpy().tobytes()
        options = {"enable_checkpointing": True, "checkpoint": saved} if self.checkpointing else {}
        pipe = self._pipeline(source=source, **options)
        self.iterator = DALIGenericIterator(pipe, self.names, prepare_first_batch=False, **iteration)
        return pipe

    def next(self) -> dict[str, torch.Tensor] | None:
        """The next batch; None at the end of an epoch."""
        self._before = self.checkpoint() if self.checkpointing else None
        self.interrupted = True
        batch = next(self.iterator, None)
        self.interrupted = False
        return None if batch is None else batch[0]

    def checkpoint(self) -> torch.Tensor:
        if not self.checkpointing:
            raise StateError("this DALIStreamLoader was built with checkpointing=False and has no state to save")
        if self.interrupted:
            assert self._before is not None
            return self._before
        return torch.frombuffer(bytearray(self.iterator.checkpoints()[0]), dtype=torch.uint8)


class _RealImages:
    """Epochs of the reader, in batches as DALI's iterator gives them."""

    def __init__(self, built: _Built, reader_name: str, last_batch: LastBatch):
        from nvidia.dali.plugin.base_iterator import LastBatchPolicy

        policies = {
            "partial": LastBatchPolicy.PARTIAL,
            "drop": LastBatchPolicy.DROP,
            "fill": LastBatchPolicy.FILL,
        }
        if last_batch not in policies:
            raise UsageError(f"last_batch={last_batch!r}: accepted are {', '.join(map(repr, policies))}")
        self._built = built
        self._begun = False
        self._iteration = {
            "reader_name": reader_name,
            "last_batch_policy": policies[last_batch],
            "auto_reset": True,
        }
        pipe = self._build(None)
        reader = pipe.reader_meta(reader_name)
        self.batch_size = pipe.max_batch_size
        # Read by StreamLoader for the length under displaced="defer".
        self.drop_last = last_batch != "partial"
        shard, shards = reader["shard_id"], reader["number_of_shards"]
        self._shards_num = shards  # as DALI's iterators have it
        self.sampler = range(
            reader["epoch_size"] * shard // shards,
            reader["epoch_size"] * (shard + 1) // shards,
        )
        if last_batch == "partial" and not reader["pad_last_batch"] and len(self.sampler) % self.batch_size:
            logger.warning(
                "the reader %r goes on into the next epoch in the last batch, and that part is lost: give it "
                "pad_last_batch=True, or last_batch='drop'",
                reader_name,
            )

    def __len__(self) -> int:
        return len(self._built.iterator)

    def __iter__(self) -> Iterator[list[dict[str, torch.Tensor]]]:
        if self._begun:
            logger.warning("the epoch was left before its end: the rest of it is read, as DALI cannot go back")
            for _ in self._rest():
                pass
        return self._rest()

    def _rest(self) -> Iterator[list[dict[str, torch.Tensor]]]:
        self._begun = True
        while (batch := self._next()) is not None:
            yield [batch]
        self._begun = False

    def _next(self) -> dict[str, torch.Tensor] | None:
        if self._built.interrupted and self._built.checkpointing:
            self._build(self._built.checkpoint())
        return self._built.next()

    def state_dict(self) -> dict[str, Any]:
        return {"tensors": {"checkpoint": self._built.checkpoint()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._build(state["tensors"]["checkpoint"])
        self._begun = False

    def close(self) -> None:
        self._built.iterator = None

    def _build(self, checkpoint: torch.Tensor | None) -> "Pipeline":
        return self._built.build(None, checkpoint, **self._iteration)


@dataclass
class _Taken:
    """A batch of the stream that the pipeline holds: `at`, the stream's state before it; the memory DALI may read."""

    synthetic: SynthBatch
    at: dict[str, Any]
    memory: tuple


class _Augmented:
    """A stream whose images have been through the pipeline: `take` gives them as a tensor, on the pipeline's device.

    The pipeline reads ahead, so the stream stands further on than what was delivered, and what steers it (a new ratio,
    feedback) acts on what the pipeline reads next. A state therefore holds both: where the stream stands, and where
    it stood before each batch that the pipeline still holds. These batches are taken again after a resume.

    The rest of the stream's surface is the stream's own.
    """

    def __init__(self, built: _Built, stream: "Stream", tensors: Tensors, batch_size: int):
        self._built, self._stream, self._tensors, self._batch_size = built, stream, tensors, batch_size
        self._taken: deque[_Taken] = deque()  # oldest first
        self._again: list[dict[str, Any]] = []  # of a state that was loaded: where the stream stood before each
        self._ready: deque[tuple[SynthBatch, dict[str, Any]]] = deque()  # for the source to give, and where from
        self._left: SynthBatch | None = None  # augmented and not delivered

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def take(self, n: int) -> SynthBatch:
        if self._built.iterator is None:
            self._build(None)
        parts, missing = [], n
        while missing:
            if self._left is None or not len(self._left):
                self._left = self._next()
            part = self._left[:missing]
            self._left = self._left[len(part) :]
            parts.append(part)
            missing -= len(part)
        return parts[0] if len(parts) == 1 else _joined(parts)

    def state_dict(self) -> dict[str, Any]:
        left = self._left if self._left is not None and len(self._left) else None
        tensors = {} if left is None else {field.name: _tensor(getattr(left, field.name)) for field in fields(left)}
        return {
            "stream": self._stream.state_dict(),
            "held": self._held(),
            "checkpoint": None if self._built.iterator is None else self._built.checkpoint(),
            "left": tensors,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        left = state["left"]
        self._stream.load_state_dict(state["stream"])
        self._build(state["checkpoint"])
        self._again = list(state["held"])
        self._left = None
        if left:
            arrays = {name: value if name == "images" else value.numpy() for name, value in left.items()}
            self._left = SynthBatch(**arrays)

    def close(self) -> None:
        self._built.iterator = None

    def _held(self) -> list[dict[str, Any]]:
        """Where the stream stood before each batch that it gave and that was not delivered."""
        return [one.at for one in self._taken] + [at for _, at in self._ready] + self._again

    def _build(self, checkpoint: torch.Tensor | None) -> None:
        self._taken.clear()
        self._ready.clear()
        self._built.build(self._source, checkpoint)

    def _source(self, iteration: int) -> tuple:
        """Called by the pipeline, ahead of what it delivers. `iteration` makes DALI resume it without a warning."""
        if self._again:
            self._take_again()
        with self._tensors.work():
            if not self._ready:
                self._take_whole()
            synthetic, at = self._ready[0]
            moved = self._tensors.moved(synthetic.images, synthetic.labels.astype(np.int32)[:, None])
        outputs = self._tensors.lists(moved)
        self._taken.append(_Taken(synthetic, at, outputs))
        self._ready.popleft()
        return outputs

    def _take_whole(self) -> None:
        at = self._stream.state_dict()
        self._ready.append((self._stream.take(self._batch_size), at))

    def _take_again(self) -> None:
        """What the pipeline held when the state was saved; then back to where the stream stands, if that is another
        place: it has been steered in between."""
        here = self._stream.state_dict()
        try:
            while self._again:
                go_to(self._stream, self._again[0])
                self._take_whole()
                del self._again[0]
        finally:
            go_to(self._stream, here)

    def _next(self) -> SynthBatch:
        if self._built.interrupted:
            held = self._held()
            self._build(self._built.checkpoint() if self._built.checkpointing else None)
            self._again = held
        batch = self._built.next()
        assert batch is not None, "the source of synthetic images never ends"
        images = batch[self._built.names[0]]
        synthetic = self._taken.popleft().synthetic
        synthetic.images = images  # type: ignore[assignment]  # a tensor from here on
        return synthetic


def _joined(parts: list[SynthBatch]) -> SynthBatch:
    columns = {field.name: [getattr(part, field.name) for part in parts] for field in fields(SynthBatch)}
    joined = {name: np.concatenate(values) for name, values in columns.items() if name != "images"}
    return SynthBatch(images=torch.cat(columns["images"]), **joined)  # type: ignore[arg-type]


def _tensor(values: Any) -> torch.Tensor:
    return values.clone() if isinstance(values, torch.Tensor) else torch.from_numpy(values.copy())

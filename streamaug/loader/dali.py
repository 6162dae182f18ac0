"""A loader that mixes images of a stream with what NVIDIA DALI reads and decodes.

StreamLoader around a DALI iterator mixes as well; this one puts synthetic images through the pipeline's operators, and
its state is exact inside an epoch. Needs the extra `dali`, imported when first used.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from streamaug.errors import StateError, UsageError
from streamaug.loader.agreement import Agreement
from streamaug.loader.dali_source import PixelLayout, Tensors, require_usable, stream_source
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
    state. An epoch left by `break` is read to its end before the next one begins, as DALI cannot go back.

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
    """A pipeline and the iterator over it, built anew for each checkpoint."""

    def __init__(self, pipeline: Callable[..., "Pipeline"], names: list[str], checkpointing: bool):
        self.names, self._checkpointing = names, checkpointing
        self._pipeline = pipeline
        self.iterator: Any = None

    def build(self, source: Any, checkpoint: torch.Tensor | None, **iteration: Any) -> "Pipeline":
        from nvidia.dali.plugin.pytorch import DALIGenericIterator

        self.iterator = None  # ends the threads of the one before
        saved = None if checkpoint is None else checkpoint.numpy().tobytes()
        options = {"enable_checkpointing": True, "checkpoint": saved} if self._checkpointing else {}
        pipe = self._pipeline(source=source, **options)
        self.iterator = DALIGenericIterator(pipe, self.names, prepare_first_batch=False, **iteration)
        return pipe

    def checkpoint(self) -> torch.Tensor:
        if not self._checkpointing:
            raise StateError("this DALIStreamLoader was built with checkpointing=False and has no state to save")
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
        while (batch := next(self._built.iterator, None)) is not None:
            yield batch
        self._begun = False

    def state_dict(self) -> dict[str, Any]:
        return {"tensors": {"checkpoint": self._built.checkpoint()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._build(state["tensors"]["checkpoint"])
        self._begun = False

    def close(self) -> None:
        self._built.iterator = None

    def _build(self, checkpoint: torch.Tensor | None) -> "Pipeline":
        return self._built.build(None, checkpoint, **self._iteration)


class _Augmented:
    """A stream whose images have been through the pipeline: `take` gives them as a tensor, on the pipeline's device.

    The rest of the stream's surface is the stream's own.
    """

    def __init__(self, built: _Built, stream: "Stream", tensors: Tensors, batch_size: int):
        self._built, self._stream, self._tensors, self._batch_size = built, stream, tensors, batch_size
        # What the pipeline holds: each batch with the state after it, and the memory that DALI may be reading.
        self._taken: deque[tuple[SynthBatch, dict, tuple]] = deque()
        self._left: SynthBatch | None = None  # augmented and not delivered
        self._state: dict[str, Any] = {}  # of the stream, where the pipeline has delivered to

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
        return {"stream": self._state, "checkpoint": self._built.checkpoint(), "left": tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        left = state["left"]
        self._stream.load_state_dict(state["stream"])
        self._build(state["checkpoint"])
        self._left = None
        if left:
            arrays = {name: value if name == "images" else value.numpy() for name, value in left.items()}
            self._left = SynthBatch(**arrays)

    def close(self) -> None:
        self._built.iterator = None

    def _build(self, checkpoint: torch.Tensor | None) -> None:
        self._taken.clear()
        self._state = self._stream.state_dict()
        self._built.build(self._source, checkpoint)

    def _source(self, iteration: int) -> tuple:
        """Called by the pipeline, ahead of what it delivers. `iteration` makes DALI resume it without a warning."""
        with self._tensors.work():
            synthetic = self._stream.take(self._batch_size)
            moved = self._tensors.moved(synthetic.images, synthetic.labels.astype(np.int32)[:, None])
        outputs = self._tensors.lists(moved)
        self._taken.append((synthetic, self._stream.state_dict(), outputs))
        return outputs

    def _next(self) -> SynthBatch:
        images = next(self._built.iterator)[0][self._built.names[0]]
        synthetic, self._state, _ = self._taken.popleft()
        synthetic.images = images  # type: ignore[assignment]  # a tensor from here on
        return synthetic


def _joined(parts: list[SynthBatch]) -> SynthBatch:
    columns = {field.name: [getattr(part, field.name) for part in parts] for field in fields(SynthBatch)}
    joined = {name: np.concatenate(values) for name, values in columns.items() if name != "images"}
    return SynthBatch(images=torch.cat(columns["images"]), **joined)  # type: ignore[arg-type]


def _tensor(values: Any) -> torch.Tensor:
    return values.clone() if isinstance(values, torch.Tensor) else torch.from_numpy(values.copy())

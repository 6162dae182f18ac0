"""One delivered batch: real rows and synthetic rows in the real batch's own structure, checked at the first one."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from streamaug.errors import MismatchError, UsageError
from streamaug.loader import batch as batches
from streamaug.loader.batch import Key, Layout
from streamaug.loader.interleave import places
from streamaug.loader.labels import Labels, check_target_transform, class_names_of, find_attribute
from streamaug.loader.likeness import Likeness
from streamaug.loader.stats import LoaderStats
from streamaug.loader.transforms import Converter, Normalize, transform_by_another_name

if TYPE_CHECKING:
    from streamaug.stream.batch import SynthBatch
    from streamaug.stream.stream import Stream

logger = logging.getLogger("streamaug")

Fill = Callable[[Key, "SynthBatch"], Any]
# (real images, transform, whether that is the dataset's) -> what brings synthetic pixels into the real form
MakeConverter = Callable[[torch.Tensor | None, Any, bool], Converter]


@dataclass(frozen=True)
class Options:
    """The arguments of StreamLoader that say how synthetic rows are written."""

    transform: Callable | Literal["dataset"] | None
    batch_transform: Callable | None
    normalize: Normalize | None
    transform_workers: int | None
    image_key: Key | None
    label_key: Key | None
    fill: Fill | None
    classes: Sequence[str] | None
    with_ids: bool
    soft_labels: bool


class Composer:
    """Finds the fields of the first real batch, checks both sides against each other, and merges batch after batch."""

    def __init__(self, stream: "Stream", options: Options, stats: LoaderStats):
        self.stream, self.options, self.stats = stream, options, stats
        self.layout: Layout | None = None
        self.labels: Labels | None = None
        self.converter: Converter | None = None
        # One rank says it for all.
        self._likeness = Likeness() if int(stream.rank) == 0 else None

    def layout_of(self, batch: Any) -> Layout:
        """Where images and labels are; found at the first batch, and said."""
        if self.layout is None:
            self.layout = Layout.detect(batch, self.options.image_key, self.options.label_key)
            logger.info(
                "images are field %r of the batch, labels field %r", self.layout.image_key, self.layout.label_key
            )
        return self.layout

    def prepare(self, batch: Any, dataset: Any, make_converter: MakeConverter) -> None:
        """At the first mixed batch: refuse where the two sides cannot go together."""
        if self.converter is not None:
            return
        layout = self.layout_of(batch)
        if layout.extra and self.options.fill is None:
            raise UsageError(
                f"the batch has fields beside images and labels: {', '.join(map(repr, layout.extra))}; say "
                "what they are for synthetic images with fill=f, f(key, synth_batch) -> tensor or list, or "
                "leave them out of the batch"
            )
        rows = layout.rows(batch)
        if self.options.classes is None:
            check_target_transform(dataset)
        self.labels = Labels(self.stream.class_names, self.options.classes or class_names_of(dataset))
        self.labels.check(rows[layout.label_key])
        transform: Any = self.options.transform
        from_dataset = transform == "dataset"
        if from_dataset:
            transform = None if self.options.batch_transform else find_attribute(dataset, "transform")
            if transform is None and not self.options.batch_transform and dataset is not None:
                self._say_no_transform(dataset)
        self.converter = make_converter(rows[layout.image_key], transform, from_dataset and transform is not None)
        self._say_copies(rows[layout.image_key].device)

    def _say_no_transform(self, dataset: Any) -> None:
        """A warning where the dataset has a transform under another name, which synthetic images do not go through."""
        name = transform_by_another_name(dataset)
        if name is None:
            logger.info(
                "the real dataset has no `transform` that holds for all its images: synthetic ones are converted and "
                "not augmented; transform= or batch_transform= does that"
            )
        else:
            logger.warning(
                "synthetic images are converted and not augmented: the real dataset has no `transform`, but %s, which "
                "they do not go through. Call the attribute `transform`, or pass transform= (a function of a uint8 "
                "tensor [C, H, W]; None says that this is meant)",
                name,
            )

    def real_only(self, batch: Any, count: int) -> Any:
        self.stats.real += count
        return batches.rebuild(batch, {}, _no_ids(count)) if self.options.with_ids else batch

    def merge(self, batch: Any, count: int, synthetic: "SynthBatch", total: int | None, key: tuple[int, ...]) -> Any:
        """`count` real images with the synthetic ones: `total` in all, or beside each other where it is None.

        `key` (seed, rank, step) decides the places in the batch and the draws of the transforms.
        """
        assert self.layout is not None and self.converter is not None and self.labels is not None
        real = self.layout.rows(batch)
        labels = real[self.layout.label_key]
        if labels.device.type == "cpu":
            self.labels.check(labels)
        made = {
            self.layout.image_key: self.converter(synthetic.images, key),
            self.layout.label_key: self.labels.encode(synthetic, labels),
        }
        for field in self.layout.extra:
            made[field] = self._filled(field, synthetic, real[field])
        self._compare(real[self.layout.image_key], made[self.layout.image_key])

        began = time.perf_counter()
        got = len(synthetic.ids)
        total = total or count + got
        at = places(key, total, got)
        merged = {field: batches.mix(real[field], made[field], at, total) for field in real}
        ids = None
        if self.options.with_ids:
            ids = _no_ids(total)
            ids[torch.from_numpy(at)] = torch.from_numpy(synthetic.ids)
        self.stats.real += total - got
        self.stats.synthetic += got
        self.stats.displaced += count + got - total
        merged_batch = batches.rebuild(batch, merged, ids)
        self.stats.mix_seconds += time.perf_counter() - began
        return merged_batch

    def synthetic_only(
        self, synthetic: "SynthBatch", key: tuple[int, ...], make_converter: MakeConverter
    ) -> tuple[torch.Tensor, ...]:
        """(images, labels), and ids where they are asked for."""
        if self.converter is None:
            transform = None if self.options.transform == "dataset" else self.options.transform
            self.converter = make_converter(None, transform, False)
            self.labels = Labels(self.stream.class_names, self.options.classes)
        assert self.labels is not None
        if (synthetic.label_mix > 0).any() and not self.options.soft_labels:
            raise UsageError(
                "the stream delivers mixed labels, which integers cannot hold: StreamLoader(None, ..., "
                "soft_labels=True) delivers float labels [n, classes]"
            )
        classes = len(self.stream.class_names)
        like = torch.empty(0, classes) if self.options.soft_labels else torch.empty(0, dtype=torch.int64)
        fields = self.converter(synthetic.images, key), self.labels.encode(synthetic, like)
        self.stats.synthetic += len(synthetic.ids)
        return (*fields, torch.from_numpy(synthetic.ids)) if self.options.with_ids else fields

    def close(self) -> None:
        if self.converter is not None:
            self.converter.close()

    def _say_copies(self, real: torch.device) -> None:
        """A hint where images made on a GPU reach the real ones there through the host."""
        # A stream that does not say where its producers run may have them on a GPU.
        made_on_gpu = getattr(self.stream, "producers_on_gpu", True)
        taken_on_cpu = self.stream.config.deliver_on == "cpu"
        if real.type == "cuda" and made_on_gpu and taken_on_cpu and int(self.stream.rank) == 0:
            logger.info(
                "real images are on %s and synthetic ones are handed out on the CPU: stream.deliver_on: cuda hands "
                "images out there without a copy through the host",
                real,
            )

    def _compare(self, real: torch.Tensor, synthetic: torch.Tensor) -> None:
        if self._likeness is not None and self._likeness.observe(real, synthetic):
            self._likeness = None

    def _filled(self, key: Key, synthetic: "SynthBatch", like: Any) -> Any:
        assert self.options.fill is not None
        values = self.options.fill(key, synthetic)
        given, needed = len(values) if hasattr(values, "__len__") else None, len(synthetic.ids)
        if given != needed:
            what = f"a {type(values).__name__}" if given is None else f"{given} values"
            raise MismatchError(
                f"fill={self.options.fill!r} gave {what} for field {key!r}; needed is a tensor or list of {needed}, "
                "one for each synthetic image"
            )
        if isinstance(like, torch.Tensor):
            return torch.as_tensor(values, dtype=like.dtype, device=like.device)
        return values


def _no_ids(count: int) -> torch.Tensor:
    return torch.full((count,), -1, dtype=torch.int64)

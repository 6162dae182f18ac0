"""StreamLoader: the user's own loader with a share of each batch made while they train.

The last stage of the picture: `Stream.take` and the real loader before it, the training step behind.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch.utils.data import BatchSampler

from streamaug.config import LoaderConfig
from streamaug.errors import MismatchError, StateError, UsageError, nearest
from streamaug.loader import batch as batches
from streamaug.loader.batch import Key, Layout
from streamaug.loader.interleave import Share, deferred_length, deferred_split, exact, places
from streamaug.loader.labels import Labels, find_attribute
from streamaug.loader.ranks import check_real, check_stream, own_state
from streamaug.loader.real import RealEpochs, samplers
from streamaug.loader.transforms import Converter, Normalize

if TYPE_CHECKING:
    from streamaug.stream.batch import SynthBatch
    from streamaug.stream.stream import Stream

logger = logging.getLogger("streamaug")

Ratio = float | Callable[[int], float]
Fill = Callable[[Key, "SynthBatch"], Any]
_STATE_VERSION = 1


@dataclass
class LoaderStats:
    """Images delivered since the run began, and seconds spent since this process began."""

    batches: int = 0
    real: int = 0
    synthetic: int = 0
    displaced: int = 0  # real images dropped to make room
    shortfall: int = 0  # synthetic images planned but not there (`starved: real`)
    take_seconds: float = 0.0  # in Stream.take, waiting included
    transform_seconds: float = 0.0
    mix_seconds: float = 0.0

    @property
    def realised_ratio(self) -> float:
        delivered = self.real + self.synthetic
        return self.synthetic / delivered if delivered else 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"realised_ratio": self.realised_ratio}


class StreamLoader:
    """Wraps any iterable of batches and mixes images of a stream into them.

        loader = StreamLoader(real_loader, stream, ratio=0.5)
        for images, labels in loader:
            ...

    real_loader: a DataLoader, StatefulDataLoader, torchdata Loader, or any iterable of batches of torch
        tensors: (images, labels, ...) as tuple, list or named tuple, or a mapping. It is read unchanged and
        never copied. None with `epoch_steps=` delivers synthetic batches only.
    ratio: synthetic share of the delivered batch in [0, 1), exact over time (the remainder is carried); or a
        function of the step (batches delivered so far). None takes the stream's configuration. It can be set
        while training (`loader.ratio = 0`); at 0 the batches are the real loader's own objects and the stream
        is not touched.
    mode: "replace" keeps the batch size and puts synthetic images in the place of real ones; "append" adds
        them.
    displaced: what becomes of the real images replaced. "drop" counts them; the epoch has as many batches as
        the real loader. "defer" serves them first in the next batch: every real image is delivered once an
        epoch, the real loader is read only as needed, and the epoch is longer by 1/(1 − ratio).
    transform: for synthetic images. "dataset" (default) uses the real dataset's `transform` where there is
        one; a function uint8 tensor [C, H, W] -> tensor; None converts to the real dtype and range. Draws
        from torch's generator inside it are keyed by (seed, rank, step) and leave the global generator alone;
        draws from `random` or numpy are not. Runs in `transform_workers` threads; its cost is in `stats()`.
    normalize: (mean, std) per channel, for pixels in [0, 1], where no transform is used.
    seed: decides where synthetic images stand in a batch.
    with_ids: adds int64 [n] ids, on the CPU, as the last field ("synthetic_ids" in a mapping); −1 is real.
    image_key, label_key: the fields of the batch (a position or a name); found at the first batch where not
        given.
    fill: values of a batch's other fields for synthetic images: `fill(key, synth_batch)` -> tensor or list.
    classes: names of the real labels in order, where the dataset has no `classes` or calls them differently.
    batch_size: images per batch where real_loader is None (the stream's batch size by default).

    Raises UsageError for arguments that cannot be used and, at the first mixed batch, MismatchError where
    real and synthetic images or labels do not agree. Of several iterators of one loader only the newest may
    go on.

    Under torch.distributed each rank wraps its own share of the real images, and its stream is made with that
    rank and world_size.
    """

    def __init__(
        self,
        real_loader: Any,
        stream: "Stream",
        ratio: Ratio | None = None,
        mode: Literal["replace", "append"] | None = None,
        *,
        displaced: Literal["drop", "defer"] | None = None,
        transform: Callable | Literal["dataset"] | None = "dataset",
        normalize: Normalize | None = None,
        seed: int = 0,
        with_ids: bool = False,
        image_key: Key | None = None,
        label_key: Key | None = None,
        fill: Fill | None = None,
        classes: Sequence[str] | None = None,
        transform_workers: int | None = None,
        epoch_steps: int | None = None,
        batch_size: int | None = None,
    ):
        if not hasattr(stream, "take"):
            raise UsageError(
                f"StreamLoader(real_loader, stream): the second argument is a Stream, got a {type(stream).__name__}"
            )
        defaults = stream.loader_config or LoaderConfig()
        self.stream = stream
        self.mode = _one_of("mode", mode or defaults.mode, ("replace", "append"))
        self.displaced = _one_of("displaced", displaced or defaults.displaced, ("drop", "defer"))
        self.seed = int(seed)
        self.with_ids = with_ids
        self.epoch_steps = epoch_steps
        self._real = None if real_loader is None else RealEpochs(real_loader)
        self._defers = self._real is not None and self.mode == "replace" and self.displaced == "defer"
        self._transform, self._normalize, self._workers = transform, normalize, transform_workers
        self._image_key, self._label_key, self._fill, self._classes = image_key, label_key, fill, classes
        self._check_arguments(ratio, displaced, batch_size)
        # Images per delivered batch: without real images, and under "defer" (0 until the first batch tells).
        self._size: int = batch_size or stream.config.batch_size
        if self._real is not None:
            self._size = getattr(real_loader, "batch_size", None) or 0
            self.ratio = defaults.ratio if ratio is None else ratio

        self._share = Share()
        self._stats = LoaderStats()
        self._epoch = 0
        self._batch = 0  # delivered in this epoch
        self._step = 0  # delivered in this run
        self._epoch_debt, self._epoch_step = Fraction(), 0  # as the epoch began
        self._waiting: Any = None  # "defer": a batch of real images read and not yet delivered

        self._layout: Layout | None = None
        self._labels: Labels | None = None
        self._converter: Converter | None = None
        self._touched = False  # the stream
        self._closed = False
        self._resumed = False
        self._mid_step = False
        self._running: object | None = None
        _meet_accelerate()

    # What training scripts and frameworks read.

    @property
    def ratio(self) -> Ratio:
        return self._ratio

    @ratio.setter
    def ratio(self, value: Ratio) -> None:
        if self._real is None:
            raise UsageError("a loader without real images delivers synthetic ones only: it has no ratio to set")
        self._ratio, self._fixed = value, None if callable(value) else exact(value)

    def __len__(self) -> int:
        """Batches in an epoch: the real loader's length, longer under `displaced="defer"`."""
        if self._real is None:
            assert self.epoch_steps is not None
            return self.epoch_steps
        length = len(self._real.loader)
        if not self._defers:
            return length
        rows, size = _epoch_rows(self._real.loader, length)
        return deferred_length(rows, size, self._epoch_debt, self._ratio_at, self._epoch_step)

    def __getattr__(self, name: str) -> Any:
        """What is public and not the wrapper's own is the real loader's: dataset, batch_size, sampler, ..."""
        if not name.startswith("_"):
            if self._real is not None:
                return getattr(self._real.loader, name)
            if name == "batch_size":
                return self._size
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def real_loader(self) -> Any:
        """The loader that is wrapped; None where there is none."""
        return None if self._real is None else self._real.loader

    def rewrap(self, real_loader: Any) -> None:
        """Wrap another loader of the same images, such as one made for this rank; before the first batch."""
        if self._step or self._resumed:
            raise UsageError("the real loader can be replaced before the first batch only")
        self._real = RealEpochs(real_loader)
        self._size = getattr(real_loader, "batch_size", None) or 0

    def labels_and_ids(self, batch: Any) -> tuple[Any, Any]:
        """Of a delivered batch, for `stream.feedback`: integer labels [n] as the stream numbers its classes, and
        ids [n] (None without `with_ids`)."""
        fields = batches.fields_of(batch)
        labels = fields[self._find_layout(batch).label_key]
        labels = labels.argmax(1) if labels.ndim == 2 else labels
        if self._labels is not None and self._labels.mapping is not None:
            labels = torch.from_numpy(np.argsort(self._labels.mapping))[labels.cpu()]
        ids = fields.get(batches.IDS_KEY, fields.get(len(fields) - 1)) if self.with_ids else None
        return labels, ids

    @property
    def epoch_is_over(self) -> bool:
        """Whether all batches of the epoch in progress were delivered. Raises TypeError without a length."""
        return self._batch >= len(self)

    def end_resumed_epoch(self) -> None:
        """After `load_state_dict`: leave the rest of the epoch in which the state was saved and begin the next one."""
        if self._resumed and self._batch:
            if self._real is not None:
                self._real.leave_resumed_epoch()
            self._end_epoch()

    def set_epoch(self, epoch: int) -> None:
        """Forwarded to the real loader or to its sampler, whichever has it."""
        if self._real is None:
            return
        for target in (self._real.loader, *samplers(self._real.loader)):
            if hasattr(target, "set_epoch"):
                target.set_epoch(epoch)
                return

    def stats(self) -> LoaderStats:
        """Images delivered and seconds spent up to now."""
        seconds = self._converter.seconds if self._converter else 0.0
        return replace(self._stats, transform_seconds=seconds)

    def close(self) -> None:
        """End the iteration. The stream stays open: other loaders may be reading it."""
        self._closed = True
        if self._converter is not None:
            self._converter.close()

    # Iteration.

    def __iter__(self) -> Iterator[Any]:
        """One epoch. Lazy: nothing starts before the first batch is asked for."""
        return self._iterate(0)

    def from_batch(self, first: int) -> "RestOfEpoch":
        """The epoch from batch `first` (counted from 0) on, for scripts that pass over what was done before a resume.

        A loader resumed by its state is there already. Another one reads the real batches before it and leaves
        them; the stream is not touched by them.
        """
        return RestOfEpoch(self, first)

    def _iterate(self, first: int) -> Iterator[Any]:
        self._check_open()
        run = self._running = object()
        self._mid_step = True
        for batch in self._epoch_batches(first):
            self._batch += 1
            self._step += 1
            self._stats.batches += 1
            self._mid_step = False
            yield batch
            self._check_open()
            if self._running is not run:
                raise UsageError(
                    "this iterator is out of date: a newer one of the same StreamLoader has started, or a "
                    "state was loaded. One loader feeds one loop at a time; build a second StreamLoader for "
                    "a second loop"
                )
            self._mid_step = True
        self._end_epoch()

    def _epoch_batches(self, first: int) -> Iterator[Any]:
        if self._batch and not self._resumed:
            self._end_epoch()
        self._resumed = False
        if self._real is None:
            return self._synthetic_only(first)
        if self._step == 0:
            check_real(self._real.loader)
        return self._deferring(self._real, first) if self._defers else self._dropping(self._real, first)

    def _passed(self, first: int) -> bool:
        """Whether the batch at hand is before the first one wanted; it then counts as delivered."""
        if self._batch >= first:
            return False
        self._batch += 1
        self._step += 1
        return True

    def _end_epoch(self) -> None:
        self._epoch += 1
        self._batch = 0
        self._waiting = None
        self._epoch_debt, self._epoch_step = self._share.debt, self._step
        self._mid_step = False
        if self._real is not None:
            self._real.close_epoch()

    def _dropping(self, real: RealEpochs, first: int) -> Iterator[Any]:
        """As many batches as the real loader has; in "replace" what is displaced is dropped."""
        for batch in real.epoch():
            count, ratio = batches.count_rows(batch), self._ratio_at(self._step)
            if ratio and not count:
                batches.fields_of(batch)  # not a batch at all: no reason to train on in silence
            if not ratio:
                planned = 0
            elif self.mode == "replace":
                planned = self._share.of_total(count, ratio)
            else:
                planned = self._share.beside(count, ratio)
            if self._passed(first):
                continue
            yield self._compose(batch, count, planned, total=count if self.mode == "replace" else None)

    def _deferring(self, real: RealEpochs, first: int) -> Iterator[Any]:
        """Every real image once: read a batch only when fewer than a batch's worth of images wait."""
        source = real.epoch()
        while True:
            held = batches.count_rows(self._waiting) if self._waiting is not None else 0
            while not self._size or held < self._size:
                batch = next(source, None)
                if batch is None:
                    break
                held += batches.count_rows(batch)
                self._size = self._size or held
                self._waiting = batch if self._waiting is None else self._joined(self._waiting, batch)
            if not held:
                return
            left = held if held < self._size else None
            count, planned = deferred_split(self._share, self._size, left, self._ratio_at(self._step))
            front = self._waiting
            if count < held:
                front, self._waiting = self._split(self._waiting, count, held)
            else:
                self._waiting = None
            if self._passed(first):
                continue
            yield self._compose(front, count, planned, total=None)

    def _synthetic_only(self, first: int) -> Iterator[Any]:
        assert self.epoch_steps is not None
        if self._converter is None:
            given = None if self._transform == "dataset" else self._transform
            self._converter = self._make_converter(None, given, from_dataset=False)
        for _ in range(self._batch, self.epoch_steps):
            if self._passed(first):
                continue
            synthetic = self._take(self._size)
            images = self._converter(synthetic.images, self._step_key())
            labels = torch.from_numpy(synthetic.labels)
            self._stats.synthetic += len(labels)
            yield (images, labels, torch.from_numpy(synthetic.ids)) if self.with_ids else (images, labels)

    def _compose(self, batch: Any, count: int, planned: int, total: int | None) -> Any:
        """`count` real images with `planned` synthetic ones: `total` in all, or added where it is None."""
        synthetic = None
        if planned:
            self._prepare(batch)
            synthetic = self._take(planned)
        if synthetic is None or len(synthetic.ids) == 0:
            self._stats.real += count
            return batches.rebuild(batch, {}, _no_ids(count)) if self.with_ids else batch
        assert self._layout is not None and self._converter is not None and self._labels is not None
        real = self._layout.rows(batch)
        labels = real[self._layout.label_key]
        if labels.device.type == "cpu":
            self._labels.check(labels)
        made = {
            self._layout.image_key: self._converter(synthetic.images, self._step_key()),
            self._layout.label_key: self._labels.encode(synthetic, labels),
        }
        for key in self._layout.extra:
            made[key] = self._filled(key, synthetic, real[key])

        began = time.perf_counter()
        got = len(synthetic.ids)
        total = total or count + got
        at = places(self._step_key(), total, got)
        merged = {key: batches.mix(real[key], made[key], at, total) for key in real}
        ids = None
        if self.with_ids:
            ids = _no_ids(total)
            ids[torch.from_numpy(at)] = torch.from_numpy(synthetic.ids)
        self._stats.real += total - got
        self._stats.synthetic += got
        self._stats.displaced += count + got - total
        merged_batch = batches.rebuild(batch, merged, ids)
        self._stats.mix_seconds += time.perf_counter() - began
        return merged_batch

    def _take(self, count: int) -> "SynthBatch":
        if not self._touched:
            check_stream(self.stream)
        self._touched = True
        began = time.perf_counter()
        synthetic = self.stream.take(count)
        self._stats.take_seconds += time.perf_counter() - began
        self._stats.shortfall += count - len(synthetic.ids)
        return synthetic

    def _step_key(self) -> tuple[int, ...]:
        return self.seed % 2**64, int(self.stream.rank), self._step

    def _ratio_at(self, step: int) -> Fraction:
        if self._fixed is not None:
            return self._fixed
        return exact(self._ratio(step))  # type: ignore[operator]

    # The real batch's structure, and the first batch's check.

    def _find_layout(self, batch: Any) -> Layout:
        if self._layout is None:
            self._layout = Layout.detect(batch, self._image_key, self._label_key)
            logger.info(
                "images are field %r of the batch, labels field %r",
                self._layout.image_key,
                self._layout.label_key,
            )
        return self._layout

    def _joined(self, first: Any, second: Any) -> Any:
        layout = self._find_layout(first)
        return batches.rebuild(second, batches.concatenate(layout.rows(first), layout.rows(second)), None)

    def _split(self, batch: Any, count: int, held: int) -> tuple[Any, Any]:
        rows = self._find_layout(batch).rows(batch)
        front, rest = batches.select(rows, 0, count), batches.select(rows, count, held)
        return batches.rebuild(batch, front, None), batches.rebuild(batch, rest, None)

    def _prepare(self, batch: Any) -> None:
        """At the first mixed batch: find its fields, and refuse where the two sides cannot go together."""
        if self._converter is not None:
            return
        layout = self._find_layout(batch)
        if layout.extra and self._fill is None:
            raise UsageError(
                f"the batch has fields beside images and labels: {', '.join(map(repr, layout.extra))}; say "
                "what they are for synthetic images with fill=f, f(key, synth_batch) -> tensor or list, or "
                "leave them out of the batch"
            )
        assert self._real is not None
        rows = layout.rows(batch)
        dataset = getattr(self._real.loader, "dataset", None)
        self._labels = Labels(self.stream.class_names, self._classes or _class_names(dataset))
        self._labels.check(rows[layout.label_key])
        transform = self._transform
        if transform == "dataset":
            transform = find_attribute(dataset, "transform")
        from_dataset = self._transform == "dataset" and transform is not None
        self._converter = self._make_converter(rows[layout.image_key], transform, from_dataset)

    def _make_converter(self, real: torch.Tensor | None, transform: Any, from_dataset: bool) -> Converter:
        return Converter(
            real,
            self.stream.image_shape,
            transform,
            from_dataset=from_dataset,
            normalize=self._normalize,
            workers=self._workers,
        )

    def _filled(self, key: Key, synthetic: "SynthBatch", like: Any) -> Any:
        assert self._fill is not None
        values = self._fill(key, synthetic)
        if len(values) != len(synthetic.ids):
            raise MismatchError(f"fill={self._fill!r} gave {len(values)} values of {key!r} for {len(synthetic.ids)}")
        if isinstance(like, torch.Tensor):
            return torch.as_tensor(values, dtype=like.dtype, device=like.device)
        return values

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands, counted in batches yielded, with the real loader's state and the stream's.

        The real part is exact for a plain DataLoader (fast-forwarded, its random state put back) and as exact
        as torchdata's own for a StatefulDataLoader, which forgets the position of a `generator=` given to it
        when the next epoch begins. The stream's part is None while no synthetic image was taken.
        """
        self._check_open()
        if self._mid_step:
            logger.warning("the batch during which the error came is lost: a run resumed from this state skips it")
        stats = self._stats
        return {
            "version": _STATE_VERSION,
            **self._identity(),
            "epoch": self._epoch,
            "batch": self._batch,
            "step": self._step,
            "debt": self._share.debt.as_integer_ratio(),
            "epoch_debt": self._epoch_debt.as_integer_ratio(),
            "epoch_step": self._epoch_step,
            "size": self._size,
            "waiting": self._waiting,
            "counts": {name: getattr(stats, name) for name in _COUNTS},
            "real": self._real.state_dict() if self._real is not None else None,
            "stream": self.stream.state_dict() if self._touched else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state: the next epoch iterated is the rest of the one it was saved in.

        Of a state with every rank's part (`integrations.gather_state`) this rank's is taken, or its share where the
        number of ranks has changed (real images then need a DistributedSampler in both runs). Raises StateError for a
        state of another kind of loader.
        """
        self._check_open()
        state = own_state(state, self.stream.rank, self.stream.world_size)
        if state.get("version") != _STATE_VERSION:
            raise StateError(
                f"a StreamLoader state of version {_STATE_VERSION} is needed, got version {state.get('version')!r}"
            )
        for name, here in self._identity().items():
            if state[name] != here:
                raise StateError(f"the state was saved with {name}={state[name]!r}, this loader has {name}={here!r}")
        self._epoch, self._batch, self._step = state["epoch"], state["batch"], state["step"]
        self._share = Share(Fraction(*state["debt"]))
        self._epoch_debt, self._epoch_step = Fraction(*state["epoch_debt"]), state["epoch_step"]
        self._size, self._waiting = state["size"], state["waiting"]
        self._stats = replace(self._stats, **state["counts"])
        if self._real is not None:
            self._real.load_state_dict(state["real"])
        if state["stream"] is not None:
            self._touched = True
            self.stream.load_state_dict(state["stream"])
        self._running, self._resumed, self._mid_step = None, True, False

    def _identity(self) -> dict[str, Any]:
        real = None if self._real is None else ("stateful" if self._real.has_state else "plain")
        return {"real_loader": real, "mode": self.mode, "displaced": self.displaced, "seed": self.seed}

    # Refusals.

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("this StreamLoader was closed; build a new one")

    def _check_arguments(self, ratio: Ratio | None, displaced: str | None, batch_size: int | None) -> None:
        if self._transform is not None and self._transform != "dataset" and not callable(self._transform):
            raise UsageError(f'transform is a function, "dataset" or None, got {self._transform!r}')
        if self._real is None:
            if not isinstance(self.epoch_steps, int) or self.epoch_steps < 1:
                raise UsageError(
                    "without a real loader the epoch has no end: StreamLoader(None, stream, "
                    f"epoch_steps=1000), got epoch_steps={self.epoch_steps!r}"
                )
            if ratio is not None:
                raise UsageError("without a real loader every image is synthetic: leave ratio out")
            if self.stream.config.starved == "real":
                raise UsageError("stream.starved: real needs a real loader to fill from; set it to wait or reuse")
            return
        if not isinstance(self._real.loader, Iterable):
            raise UsageError(
                f"the first argument is a loader of batches, got a {type(self._real.loader).__name__}; None "
                "with epoch_steps= delivers synthetic images only"
            )
        if self.epoch_steps is not None or batch_size is not None:
            raise UsageError("epoch_steps and batch_size are the real loader's where there is one: leave them out")
        if displaced == "defer" and self.mode == "append":
            raise UsageError('displaced="defer" goes with mode="replace"; mode="append" displaces nothing')
        if self._defers and self.stream.config.starved == "real":
            raise UsageError(
                'displaced="defer" delivers each real image once and has none to spare for '
                'stream.starved: real; set it to wait or reuse, or use displaced="drop"'
            )


class RestOfEpoch:
    """An epoch of a StreamLoader without its first batches; everything else is the loader's."""

    def __init__(self, loader: StreamLoader, first: int):
        self.loader = loader
        self.first = first

    def __iter__(self) -> Iterator[Any]:
        return self.loader._iterate(self.first)

    def __len__(self) -> int:
        return max(len(self.loader) - self.first, 0)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "loader":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.loader, name)


_COUNTS = ("batches", "real", "synthetic", "displaced", "shortfall")


def _one_of(name: str, value: Any, accepted: tuple[str, ...]) -> Any:
    if value not in accepted:
        raise UsageError(
            f"{name}={value!r}: accepted are {', '.join(map(repr, accepted))}{nearest(str(value), accepted)}"
        )
    return value


def _meet_accelerate() -> None:
    """Accelerate prepares DataLoaders only; where it is in use, it learns to prepare what a StreamLoader wraps."""
    if sys.modules.get("accelerate") is not None:
        from streamaug.integrations.accelerate import enable

        enable()


def _no_ids(count: int) -> torch.Tensor:
    return torch.full((count,), -1, dtype=torch.int64)


def _class_names(dataset: Any) -> list[str] | None:
    names = find_attribute(dataset, "classes")
    return [str(name) for name in names] if isinstance(names, list | tuple) else None


def _epoch_rows(loader: Any, length: int) -> tuple[int, int]:
    """(real images of an epoch, images per batch) of a loader that knows them. Raises TypeError otherwise."""
    size: Any = getattr(loader, "batch_size", None)
    sampler: Any = getattr(loader, "sampler", None)
    if type(getattr(loader, "batch_sampler", None)) is BatchSampler:
        size, sampler = loader.batch_sampler.batch_size, loader.batch_sampler.sampler
    if not size or not hasattr(sampler, "__len__"):
        raise TypeError(
            'the length under displaced="defer" follows from the batch_size and the length of the sampler; '
            f"this {type(loader).__name__} lacks them"
        )
    return (length * size if getattr(loader, "drop_last", False) else len(sampler)), size

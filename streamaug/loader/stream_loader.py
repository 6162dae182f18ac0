"""StreamLoader: the user's own loader with a share of each batch made while they train.

The last stage of the picture: `Stream.take` and the real loader before it, the training step behind.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from streamaug.config import LoaderConfig
from streamaug.errors import UsageError
from streamaug.loader import arguments, state
from streamaug.loader import batch as batches
from streamaug.loader.batch import Key
from streamaug.loader.compose import Composer, Fill, Options
from streamaug.loader.dali_iterator import epochs_of
from streamaug.loader.deferring import Deferred
from streamaug.loader.frequencies import Classes
from streamaug.loader.interleave import Share, deferred_length, say_resolution
from streamaug.loader.labels import integers
from streamaug.loader.ranks import check_real, check_stream, own_state
from streamaug.loader.ratios import Ratio, Shares, from_config
from streamaug.loader.real import RealEpochs, samplers
from streamaug.loader.rest import RestOfEpoch
from streamaug.loader.stats import COUNTS, LoaderStats
from streamaug.loader.transforms import Converter, Normalize

if TYPE_CHECKING:
    from streamaug.stream.batch import SynthBatch
    from streamaug.stream.stream import Stream

logger = logging.getLogger("streamaug")


class StreamLoader:
    """Wraps any iterable of batches and mixes images of a stream into them.

        loader = StreamLoader(real_loader, stream, ratio=0.5)
        for images, labels in loader:
            ...

    real_loader: a DataLoader, StatefulDataLoader, torchdata Loader, or any iterable of batches of torch
        tensors: (images, labels, ...) as tuple, list or named tuple, or a mapping; or a DALI iterator over one
        pipeline, [{"data": ..., "label": ...}], with images in either layout. It is read unchanged and never copied.
        Labels are integers [n] or [n, 1], one-hot or soft [n, classes]. None with `epoch_steps=` delivers synthetic
        batches only.
    ratio: synthetic share of the delivered batch in [0, 1), exact over time (the remainder is carried); or a
        function of the step (batches delivered so far), such as `ratios.warmup` and `ratios.cosine` make; or one
        share for each class, {"cat": 0.5, "default": 0.1}, by name or real label: of what is delivered of that class
        so much is synthetic. That sets the share of the whole and, by `Stream.replan`, the class weights of the
        stream; the whole is exact, each class follows as the stream's classes follow their weights (the judge's
        rejections are made up for; `Stream.feedback` moves them within its bounds). Real images make room whatever
        their class. None takes the stream's configuration. It can be set while training (`loader.ratio = 0`) and is
        then part of the state; at 0 the batches are the real loader's own objects and the stream is not touched.
    mode: "replace" keeps the batch size and puts synthetic images in the place of real ones; "append" adds
        them.
    displaced: what becomes of the real images replaced. "drop" counts them; the epoch has as many batches as
        the real loader. "defer" serves them first in the next batch: every real image is delivered once an
        epoch, the real loader is read only as needed, and the epoch is longer by 1/(1 − ratio).
    transform: for synthetic images. "dataset" (default) uses the real dataset's `transform` where there is
        one; a function uint8 tensor [C, H, W] -> tensor; None converts to the real dtype and range. Draws
        from torch's generator inside it are keyed by (seed, rank, step) and leave the global generator alone;
        draws from `random` or numpy are not. Runs in `transform_workers` threads; its cost is in `stats()`.
    batch_transform: for all synthetic images of a batch at once, on the device of the real batch: a function uint8
        tensor [n, C, H, W] -> tensor, such as torchvision's v2 transforms, which then draw once for all of them. In
        place of the dataset's transform, after a `transform` function. What it leaves uint8 is scaled, normalised and
        cast on the device in one pass.
    normalize: (mean, std) per channel, for pixels in [0, 1], where no transform makes floats.
    seed: decides where synthetic images stand in a batch.
    with_ids: adds int64 [n] ids, on the CPU, as the last field ("synthetic_ids" in a mapping); −1 is real.
    image_key, label_key: the fields of the batch (a position or a name); found at the first batch where not
        given.
    fill: values of a batch's other fields for synthetic images: `fill(key, synth_batch)` -> tensor or list.
    classes: names of the real labels in order, where the dataset has no `classes` or calls them differently.
    class_counts: how many real images each class has, by real label, at any scale, for a ratio by class; read from
        the dataset and its sampler where not given, and taken as equal where these do not say.
    epoch_steps, batch_size, soft_labels: where real_loader is None, batches in an epoch, images per batch (the
        stream's by default), and labels as float [n, classes] for recipes that mix classes.

    Raises UsageError for arguments that cannot be used and, at the first mixed batch, MismatchError where
    real and synthetic images or labels do not agree. Where the first images of both sides differ much in brightness
    or contrast it warns and saves a picture. Of several iterators of one loader only the newest may go on.

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
        batch_transform: Callable | None = None,
        normalize: Normalize | None = None,
        seed: int = 0,
        with_ids: bool = False,
        image_key: Key | None = None,
        label_key: Key | None = None,
        fill: Fill | None = None,
        classes: Sequence[str] | None = None,
        class_counts: Sequence[float] | None = None,
        transform_workers: int | None = None,
        epoch_steps: int | None = None,
        batch_size: int | None = None,
        soft_labels: bool = False,
    ):
        arguments.check_stream(stream)
        arguments.check_transforms(transform, batch_transform)
        defaults = stream.loader_config or LoaderConfig()
        self.stream = stream
        self.mode = arguments.one_of("mode", mode or defaults.mode, ("replace", "append"))
        self.displaced = arguments.one_of("displaced", displaced or defaults.displaced, ("drop", "defer"))
        self.seed = arguments.check_seed(seed)
        self.with_ids = with_ids
        self.epoch_steps = epoch_steps
        self._real = None if real_loader is None else epochs_of(real_loader)
        self._classes, self._class_counts = classes, class_counts
        self._stats = LoaderStats()
        options = Options(
            transform=transform,
            batch_transform=batch_transform,
            normalize=normalize,
            transform_workers=transform_workers,
            image_key=image_key,
            label_key=label_key,
            fill=fill,
            classes=classes,
            with_ids=with_ids,
            soft_labels=soft_labels,
        )
        self._composer = Composer(stream, options, self._stats)
        self._deferred: Deferred | None = None
        self._size: int = stream.config.batch_size if batch_size is None else batch_size  # without real images
        if self._real is None:
            arguments.check_synthetic_only(ratio is not None, epoch_steps, self._size, stream.config)
        else:
            arguments.check_real_loader(real_loader)
            if isinstance(real_loader, StreamLoader):
                logger.warning(
                    "the loader is a StreamLoader already: both ratios apply, one upon the other. Where that is not "
                    "meant (a cell of a notebook that ran twice), make the DataLoader anew, or wrap loader.real_loader"
                )
            arguments.check_mixed(
                mode=self.mode,
                displaced=self.displaced,
                displaced_given=displaced is not None,
                epoch_steps=epoch_steps,
                batch_size=batch_size,
                soft_labels=soft_labels,
                config=stream.config,
            )
            if self.mode == "replace" and self.displaced == "defer":
                self._deferred = Deferred(_batch_size(real_loader), self._composer.layout_of)
            self.ratio = defaults.ratio if ratio is None else ratio
            self._given_ratio = self.ratio

        self._share = Share()
        self._class_weights: list[float] | None = None  # the stream's plan as this loader set it
        self._epoch = 0
        self._batch = 0  # delivered in this epoch
        self._step = 0  # delivered in this run
        self._epoch_debt, self._epoch_step = Fraction(), 0  # as the epoch began
        self._before: dict[str, Any] | None = None  # the stream's state as this loader found it; None: not touched yet
        self._closed = False
        self._resumed = False
        self._mid_step = False
        self._resolution_said = False
        self._running: object | None = None
        _meet_accelerate()

    # What training scripts and frameworks read.

    def __repr__(self) -> str:
        if self._real is None:
            return f"<StreamLoader of {self.epoch_steps} synthetic batches of {self._size} from {self.stream!r}>"
        real = type(self.real_loader).__name__
        return f"<StreamLoader of a {real} and {self.stream!r}, ratio {self.ratio}, mode {self.mode}>"

    @property
    def ratio(self) -> Ratio:
        return self._shares.ratio

    @ratio.setter
    def ratio(self, value: Ratio) -> None:
        if self._real is None:
            raise UsageError("a loader without real images delivers synthetic ones only: it has no ratio to set")
        classes = Classes(self.stream.class_names, self.real_loader, self._classes, self._class_counts)
        self._shares = Shares(from_config(value), classes.names, classes.real_names, classes.real_counts)
        self._fixed = self._shares.fixed
        if self._fixed is not None:
            self.stream.asked_ratio = float(self._fixed)

    def __len__(self) -> int:
        """Batches in an epoch: the real loader's length, longer under `displaced="defer"`."""
        if self._real is None:
            assert self.epoch_steps is not None
            return self.epoch_steps
        if self._deferred is None:
            return self._real.length()
        rows, size = self._real.images()
        return deferred_length(rows, size, self._epoch_debt, self._shares.at, self._epoch_step)

    def __getattr__(self, name: str) -> Any:
        """What is public and not the wrapper's own is the real loader's: dataset, batch_size, sampler, ..."""
        # `next` of a DALI iterator would take a batch away from the loader.
        if not name.startswith("_") and name != "next":
            if self._real is not None:
                return getattr(self._real.loader, name)
            if name == "batch_size":
                return self._size
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        """What is public and not the wrapper's own is set on the real loader, where that has it."""
        if not name.startswith("_") and name not in self.__dict__ and not hasattr(type(self), name):
            real = self.__dict__.get("_real")
            if real is not None and hasattr(real.loader, name):
                setattr(real.loader, name, value)
                return
        object.__setattr__(self, name, value)

    @property
    def real_loader(self) -> Any:
        """The loader that is wrapped; None where there is none."""
        return None if self._real is None else self._real.loader

    def rewrap(self, real_loader: Any) -> None:
        """Wrap another loader of the same images, such as one made for this rank; before the first batch."""
        if self._step or self._resumed:
            raise UsageError("the real loader can be replaced before the first batch only")
        arguments.check_real_loader(real_loader)
        self._real = epochs_of(real_loader)
        if self._deferred is not None:
            self._deferred.size = _batch_size(real_loader)

    def labels_and_ids(self, batch: Any) -> tuple[Any, Any]:
        """Of a delivered batch, for `stream.feedback`: integer labels [n] as the stream numbers its classes, and
        ids [n] (None without `with_ids`)."""
        fields = batches.fields_of(batch)
        labels = fields[self._composer.layout_of(batch).label_key]
        labels = integers(labels, len(self.stream.class_names))
        names = self._composer.labels
        if names is not None and names.mapping is not None:
            labels = torch.from_numpy(np.argsort(names.mapping))[labels.cpu()]
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
        converter = self._composer.converter
        return replace(self._stats, transform_seconds=converter.seconds if converter else 0.0)

    def close(self) -> None:
        """End the iteration. The stream stays open: other loaders may be reading it."""
        self._closed = True
        self._composer.close()

    # Iteration.

    def __iter__(self) -> Iterator[Any]:
        """One epoch. Lazy: nothing starts before the first batch is asked for."""
        return self._iterate(0)

    def from_batch(self, first: int) -> RestOfEpoch:
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
        return self._dropping(self._real, first) if self._deferred is None else self._deferring(self._real, first)

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
        self._epoch_debt, self._epoch_step = self._share.debt, self._step
        self._mid_step = False
        if self._deferred is not None:
            self._deferred.waiting = None
        if self._real is not None:
            self._real.close_epoch()

    def _dropping(self, real: RealEpochs, first: int) -> Iterator[Any]:
        """As many batches as the real loader has; in "replace" what is displaced is dropped."""
        replaces = self.mode == "replace"
        for batch in real.epoch():
            ratio = self._fixed if self._fixed is not None else self._shares.at(self._step)
            count = batches.count_rows(batch)
            planned = 0
            if ratio:
                if not count:
                    self._composer.layout_of(batch)  # not a batch at all: no reason to train on in silence
                planned = self._share.of_total(count, ratio) if replaces else self._share.beside(count, ratio)
                self._say_resolution(count, planned)
            if self._passed(first):
                continue
            yield self._compose(batch, count, planned, total=count if replaces else None)

    def _deferring(self, real: RealEpochs, first: int) -> Iterator[Any]:
        """Every real image once, in longer epochs."""
        assert self._deferred is not None
        for batch, count, planned in self._deferred.split(
            real.epoch(), self._share, lambda: self._shares.at(self._step)
        ):
            self._say_resolution(count, planned)
            if self._passed(first):
                continue
            yield self._compose(batch, count, planned, total=None)

    def _synthetic_only(self, first: int) -> Iterator[Any]:
        assert self.epoch_steps is not None
        for _ in range(self._batch, self.epoch_steps):
            if self._passed(first):
                continue
            yield self._composer.synthetic_only(self._take(self._size), self._step_key(), self._make_converter)

    def _say_resolution(self, count: int, planned: int) -> None:
        """Once, and not of a schedule, which may begin small."""
        if not self._resolution_said and self._shares.is_fixed:
            self._resolution_said = True
            ratio = self._shares.at(self._step)
            total = count if self.mode == "replace" and self._deferred is None else count + planned
            say_resolution(ratio, total)

    def _compose(self, batch: Any, count: int, planned: int, total: int | None) -> Any:
        """`count` real images with `planned` synthetic ones: `total` in all, or added where it is None."""
        if not planned:
            return self._composer.real_only(batch, count)
        if self._fixed is None:
            self.stream.asked_ratio = float(self._shares.at(self._step))
        self._composer.prepare(batch, getattr(self.real_loader, "dataset", None), self._make_converter)
        self._touch()
        if self._shares.class_weights() != self._class_weights:
            self._follow_classes()
        synthetic = self._take(planned)
        if len(synthetic.ids) == 0:
            return self._composer.real_only(batch, count)
        return self._composer.merge(batch, count, synthetic, total, self._step_key())

    def _take(self, count: int) -> "SynthBatch":
        self._touch()
        began = time.perf_counter()
        synthetic = self.stream.take(count)
        self._stats.take_seconds += time.perf_counter() - began
        self._stats.shortfall += count - len(synthetic.ids)
        return synthetic

    def _touch(self) -> None:
        if self._before is None:
            check_stream(self.stream)
            self._before = self.stream.state_dict()

    def _reads_stream(self) -> bool:
        """Whether it did, or will without another ratio."""
        at_zero = self._real is not None and self._shares.is_fixed and not self._shares.at(self._step)
        return self._before is not None or not at_zero

    def _step_key(self) -> tuple[int, ...]:
        return self.seed % 2**64, int(self.stream.rank), self._step

    def _make_converter(self, real: torch.Tensor | None, transform: Any, from_dataset: bool) -> Converter:
        options, layout = self._composer.options, self._composer.layout
        return Converter(
            real,
            self.stream.image_shape,
            transform,
            from_dataset=from_dataset,
            normalize=options.normalize,
            workers=options.transform_workers,
            batch_transform=options.batch_transform,
            any_layout=layout is not None and layout.boxed,
        )

    def _follow_classes(self) -> None:
        """Of a ratio by class: set what classes the stream makes. What it had in flight is dropped."""
        wanted = self._shares.class_weights()
        self.stream.replan(class_weights=None if wanted is None else np.array(wanted))
        self._class_weights = wanted

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands, counted in batches yielded, with the real loader's state and the stream's.

        The real part is exact for a plain DataLoader (fast-forwarded, its random state put back; random transforms in
        persistent workers, which PyTorch seeds only when they start, draw otherwise) and as exact
        as torchdata's own for a StatefulDataLoader, which forgets the position of a `generator=` given to it
        when the next epoch begins. It is exact for a DALI iterator whose pipeline has enable_checkpointing=True.
        Without, one with a fixed seed reads again all that was read before inside an epoch, one without raises
        StateError there, and between epochs both shuffle as new ones do after a resume. The stream's part is None while
        the ratio is 0 and no synthetic image was taken.
        """
        self._check_open()
        if self._mid_step:
            logger.warning("the batch during which the error came is lost: a run resumed from this state skips it")
        deferred = self._deferred
        return {
            "version": state.VERSION,
            "identity": self._identity(),
            "epoch": self._epoch,
            "batch": self._batch,
            "step": self._step,
            "debt": self._share.debt.as_integer_ratio(),
            "epoch_debt": self._epoch_debt.as_integer_ratio(),
            "epoch_step": self._epoch_step,
            "ratio": state.saved_ratio(self._given_ratio, self.ratio) if self._real is not None else None,
            "class_weights": self._class_weights,
            "size": deferred.size if deferred is not None else None,
            "waiting": deferred.waiting if deferred is not None else None,
            "counts": {name: getattr(self._stats, name) for name in COUNTS},
            "real": self._real.state_dict() if self._real is not None else None,
            "stream": self.stream.state_dict() if self._reads_stream() else None,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from a state: the next epoch iterated is the rest of the one it was saved in.

        Of a state with every rank's part (`integrations.gather_state`) this rank's is taken, or its share where the
        number of ranks has changed (real images then need a DistributedSampler in both runs, or the end of an epoch).
        A ratio that was set while training goes on. Raises StateError for a state of another kind of loader.
        """
        self._check_open()
        saved = own_state(saved, self)
        state.check(saved, self._identity())
        self._epoch, self._batch, self._step = saved["epoch"], saved["batch"], saved["step"]
        self._share = Share(Fraction(*saved["debt"]))
        self._epoch_debt, self._epoch_step = Fraction(*saved["epoch_debt"]), saved["epoch_step"]
        for name in COUNTS:
            setattr(self._stats, name, saved["counts"][name])
        if self._deferred is not None:
            self._deferred.size, self._deferred.waiting = saved["size"], saved["waiting"]
        if self._real is not None:
            ratio = state.loaded_ratio(saved["ratio"], self._given_ratio)
            if ratio is not None:
                self.ratio = ratio
            self._real.load_state_dict(saved["real"])
        self._class_weights = saved["class_weights"]
        if saved["stream"] is not None:
            self._touch()
            self.stream.load_state_dict(saved["stream"])
        elif self._before is not None:
            self.stream.load_state_dict(self._before)
            self._before = None
        self._running, self._resumed, self._mid_step = None, True, False

    def _identity(self) -> dict[str, Any]:
        return state.identity(
            self.real_loader,
            kind="" if self._real is None else self._real.kind,
            mode=self.mode,
            displaced=self.displaced,
            seed=self.seed,
            epoch_steps=self.epoch_steps,
            size=self._size,
        )

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("this StreamLoader was closed; build a new one")


def _batch_size(loader: Any) -> int:
    return getattr(loader, "batch_size", None) or 0


def _meet_accelerate() -> None:
    """Accelerate prepares DataLoaders only; where it is in use, it learns to prepare what a StreamLoader wraps."""
    if sys.modules.get("accelerate") is not None:
        from streamaug.integrations.accelerate import enable

        enable()

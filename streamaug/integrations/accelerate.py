"""Accelerate: `prepare` takes a StreamLoader as it takes a DataLoader.

`prepare` rebuilds DataLoaders (for this rank's share, on its device) and passes everything else through untouched. With
this module it prepares what the StreamLoader wraps, so that sharding, device placement, `split_batches`, gradient
accumulation and `gather_for_metrics` are Accelerate's own. `save_state` writes the loader's state (one file a rank),
`load_state` resumes it, and `skip_first_batches` then finds nothing left to skip.

Set `use_seedable_sampler` to resume inside an epoch with another number of ranks, and beside `use_stateful_dataloader`:
without it Accelerate itself forgets the shuffled order.
Images that Accelerate repeats to fill the last batch of several ranks stay in what `gather_for_metrics` returns under
mode="append" and displaced="defer".
"""

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

from streamaug.errors import MissingExtra, UsageError
from streamaug.integrations import files
from streamaug.loader.stream_loader import StreamLoader

try:
    import accelerate
    from accelerate import Accelerator
    from accelerate.data_loader import DataLoaderDispatcher
    from accelerate.state import GradientState
except ImportError:
    raise MissingExtra("accelerate", "integrations") from None

_ENABLED = "_streamaug"  # marks the functions below, and the loaders of an Accelerator
_STEP = "accelerator_step"


def enable() -> None:
    """Make Accelerate know StreamLoaders. A StreamLoader built after `import accelerate` calls it by itself."""
    if hasattr(Accelerator.prepare, _ENABLED):
        return
    Accelerator.prepare = _marked(_prepare(Accelerator.prepare))  # type: ignore[method-assign]
    # Called on its own, it would build a loader of the real images alone.
    Accelerator.prepare_data_loader = _for_stream_loaders(Accelerator.prepare_data_loader)  # type: ignore[method-assign]
    # Reached by accelerator.prepare(StreamLoader(...)): there `prepare` was looked up before the first StreamLoader
    # existed, and with it this module.
    Accelerator._prepare_one = _for_stream_loaders(Accelerator._prepare_one)  # type: ignore[method-assign]
    original = accelerate.skip_first_batches
    replacement = _marked(_skip_first_batches(original))
    # Scripts import this function by name; theirs would go on without the stream.
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get("skip_first_batches") is original:
            module.skip_first_batches = replacement  # type: ignore[attr-defined]


def _marked(function: Callable) -> Callable:
    setattr(function, _ENABLED, True)
    return function


def _prepare(original: Callable) -> Callable:
    @wraps(original)
    def prepare(self: Accelerator, *args: Any, **options: Any) -> Any:
        if not any(isinstance(arg, StreamLoader) for arg in args):
            return original(self, *args, **options)
        result = original(self, *(arg.real_loader if isinstance(arg, StreamLoader) else arg for arg in args), **options)
        prepared = result if len(args) > 1 else (result,)
        out = tuple(
            _attached(self, arg, one) if isinstance(arg, StreamLoader) else one
            for arg, one in zip(args, prepared, strict=True)
        )
        return out if len(out) > 1 else out[0]

    return prepare


def _for_stream_loaders(original: Callable) -> Callable:
    """Of one object: a StreamLoader's real loader is prepared, and the StreamLoader given back."""

    @wraps(original)
    def prepare_one(self: Accelerator, given: Any, *args: Any, **options: Any) -> Any:
        if not isinstance(given, StreamLoader):
            return original(self, given, *args, **options)
        return _attached(self, given, original(self, given.real_loader, *args, **options))

    return prepare_one


def _skip_first_batches(original: Callable) -> Callable:
    @wraps(original)
    def skip_first_batches(dataloader: Any, num_batches: int = 0) -> Any:
        if isinstance(dataloader, StreamLoader):
            return dataloader.from_batch(num_batches)
        return original(dataloader, num_batches=num_batches)

    return skip_first_batches


def _attached(accelerator: Accelerator, loader: StreamLoader, prepared: Any) -> StreamLoader:
    """The loader around its prepared real loader, with its state in the accelerator's checkpoints."""
    if prepared is not loader.real_loader:
        tell_the_end(accelerator, loader, prepared)
        loader.rewrap(prepared)
    loaders = getattr(accelerator, _ENABLED, None)
    if loaders is None:
        loaders = []
        setattr(accelerator, _ENABLED, loaders)
        accelerator.register_save_state_pre_hook(lambda models, weights, folder: _save(accelerator, loaders, folder))
        accelerator.register_load_state_pre_hook(lambda models, folder: _load(accelerator, loaders, folder))
    if loader not in loaders:
        loaders.append(loader)
    return loader


def _save(accelerator: Accelerator, loaders: list[StreamLoader], folder: str) -> None:
    for number, loader in enumerate(loaders):
        files.save_state(loader, folder, _name(number), **{_STEP: accelerator.step})


def _load(accelerator: Accelerator, loaders: list[StreamLoader], folder: str) -> None:
    for number, loader in enumerate(loaders):
        saved = files.load_state(loader, folder, _name(number))
        # Accelerate finds it on the ranks that saved it. Where others count accumulated gradients otherwise, the ranks
        # wait for one another without end.
        accelerator.step = saved[_STEP]


def _name(number: int) -> str:
    return f"stream_loader_{number}"


# Where an epoch ends.


def tell_the_end(accelerator: Accelerator, loader: StreamLoader, prepared: Any) -> None:
    """Let Accelerate see where the StreamLoader's epoch ends, where that is not where its real loader's does.

    Under "defer" displaced images are left to deliver when the last real batch was read; the end of a gradient
    accumulation must wait for them. Under "append" `gather_for_metrics` would cut the last batch to as many images as
    there are real ones. Raises UsageError where ranks would deliver different numbers of batches.
    """
    defers = loader.displaced == "defer" and loader.mode == "replace"
    if defers and accelerator.num_processes > 1:
        _give_each_rank_as_many(accelerator, prepared)
    if defers or loader.mode == "append":
        prepared.gradient_state = _Unheard()
        _keep_books(loader, prepared)


def _give_each_rank_as_many(accelerator: Accelerator, prepared: Any) -> None:
    """Every rank reads full batches, and the length of the epoch follows from their number."""
    if isinstance(prepared, DataLoaderDispatcher) or not accelerator.even_batches:
        raise UsageError(
            'displaced="defer" on several ranks needs real batches that each rank reads for itself, as many images '
            'on each: leave dispatch_batches and even_batches of Accelerate as they are, or use displaced="drop"'
        )
    prepared.batch_size = prepared.total_batch_size // accelerator.num_processes
    prepared.drop_last = True  # of batches that are not full there are none: Accelerate fills the last one


class _Unheard:
    """Takes what a prepared loader tells the GradientState: the loader around it tells the right thing."""

    def _add_dataloader(self, dataloader: Any) -> None:
        pass

    _remove_dataloader = _add_dataloader


class _Books:
    """What the GradientState reads of the loader in progress."""

    remainder = -1  # what is gathered is not cut

    def __init__(self, loader: StreamLoader, prepared: Any):
        self._loader, self._prepared = loader, prepared

    @property
    def end_of_dataloader(self) -> bool:
        """Whether the batch that was delivered last is the epoch's last: nothing is left to read, nothing waits."""
        deferred, real = self._loader._deferred, self._loader._real
        all_read = self._prepared.end_of_dataloader or (real is not None and real.finished)
        return all_read and (deferred is None or deferred.waiting is None)


def _keep_books(loader: StreamLoader, prepared: Any) -> None:
    state, books, iterate = GradientState(), _Books(loader, prepared), loader._iterate

    @wraps(iterate)
    def kept(first: int) -> Any:
        state._add_dataloader(books)
        try:
            yield from iterate(first)
        finally:
            state._remove_dataloader(books)

    loader._iterate = kept  # type: ignore[method-assign]

"""Accelerate: `prepare` takes a StreamLoader as it takes a DataLoader.

`prepare` rebuilds DataLoaders (for this rank's share, on its device) and passes everything else through untouched. With
this module it prepares what the StreamLoader wraps, so that sharding, device placement, `split_batches`, gradient
accumulation and `gather_for_metrics` are Accelerate's own. `save_state` writes the loader's state (one file a rank),
`load_state` resumes it, and `skip_first_batches` then finds nothing left to skip.

With `use_stateful_dataloader` also set `use_seedable_sampler`: without it Accelerate itself forgets the shuffled order.
After several ranks, images that Accelerate repeats to fill the last batch stay in what is gathered under mode="append".
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
except ImportError:
    raise MissingExtra("accelerate", "integrations") from None

_ENABLED = "_streamaug"  # marks the functions below, and the loaders of an Accelerator


def enable() -> None:
    """Make Accelerate know StreamLoaders. A StreamLoader built after `import accelerate` calls it by itself."""
    if hasattr(Accelerator.prepare, _ENABLED):
        return
    Accelerator.prepare = _marked(_prepare(Accelerator.prepare))  # type: ignore[method-assign]
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


def _skip_first_batches(original: Callable) -> Callable:
    @wraps(original)
    def skip_first_batches(dataloader: Any, num_batches: int = 0) -> Any:
        if isinstance(dataloader, StreamLoader):
            return dataloader.from_batch(num_batches)
        return original(dataloader, num_batches=num_batches)

    return skip_first_batches


def _attached(accelerator: Accelerator, loader: StreamLoader, prepared: Any) -> StreamLoader:
    """The loader around its prepared real loader, with its state in the accelerator's checkpoints."""
    if loader.displaced == "defer" and loader.mode == "replace":
        raise UsageError(
            'displaced="defer" reads the last real batch before it delivers the last batch, and Accelerate ends the '
            'epoch (and a gradient accumulation) with what is read; use displaced="drop"'
        )
    if prepared is not loader.real_loader:
        loader.rewrap(prepared)
    if loader.mode == "append":
        # gather_for_metrics cuts the last batch to the real images that are left, counted from the front; told that
        # the last batch is dropped, Accelerate leaves it as it is.
        prepared._drop_last = True
    loaders = getattr(accelerator, _ENABLED, None)
    if loaders is None:
        loaders = []
        setattr(accelerator, _ENABLED, loaders)
        accelerator.register_save_state_pre_hook(
            lambda models, weights, folder: _each(files.save_state, loaders, folder)
        )
        accelerator.register_load_state_pre_hook(lambda models, folder: _each(files.load_state, loaders, folder))
    if loader not in loaders:
        loaders.append(loader)
    return loader


def _each(action: Callable, loaders: list[StreamLoader], folder: str) -> None:
    for number, loader in enumerate(loaders):
        action(loader, folder, f"stream_loader_{number}")

"""Arguments of a StreamLoader that cannot be used, refused when it is built."""

from collections.abc import Iterable, Iterator
from numbers import Integral
from typing import Any

from torch.utils.data import Dataset

from streamaug.config import StreamConfig
from streamaug.errors import UsageError, nearest


def one_of(name: str, value: Any, accepted: tuple[str, ...]) -> Any:
    if value not in accepted:
        raise UsageError(
            f"{name}={value!r}: accepted are {', '.join(map(repr, accepted))}{nearest(str(value), accepted)}"
        )
    return value


def check_stream(stream: Any) -> None:
    if not hasattr(stream, "take"):
        got = f"{stream!r}: Stream.from_config({stream!r})" if isinstance(stream, str) else f"a {type(stream).__name__}"
        raise UsageError(f"StreamLoader(real_loader, stream): the second argument is a Stream, got {got}")


def check_transforms(transform: Any, batch_transform: Any) -> None:
    if transform is not None and transform != "dataset" and not callable(transform):
        raise UsageError(f'transform is a function, "dataset" or None, got {transform!r}')
    if batch_transform is not None and not callable(batch_transform):
        raise UsageError(f"batch_transform is a function of a batch of images, or None, got {batch_transform!r}")


def check_real_loader(loader: Any) -> None:
    if isinstance(loader, Dataset):
        raise UsageError(
            f"the first argument is a loader of batches, got a dataset ({type(loader).__name__}): "
            "DataLoader(dataset, batch_size=64, shuffle=True)"
        )
    if not isinstance(loader, Iterable):
        raise UsageError(
            f"the first argument is a loader of batches, got a {type(loader).__name__}; None "
            "with epoch_steps= delivers synthetic images only"
        )
    started = type(loader).__module__.startswith(("torch.utils.data", "torchdata.stateful_dataloader"))
    if started and isinstance(loader, Iterator):
        raise UsageError(
            f"the first argument is the iterator of a loader that was already started ({type(loader).__name__}): pass "
            "the DataLoader itself, of which each epoch makes an iterator"
        )


def check_mixed(
    *,
    mode: str,
    displaced: str,
    displaced_given: bool,
    epoch_steps: int | None,
    batch_size: int | None,
    soft_labels: bool,
    config: StreamConfig,
) -> None:
    """Of a loader with real images."""
    if epoch_steps is not None or batch_size is not None:
        raise UsageError("epoch_steps and batch_size are the real loader's where there is one: leave them out")
    if soft_labels:
        raise UsageError("soft_labels is for a loader without real images: with them, labels take the real ones' form")
    if displaced_given and displaced == "defer" and mode == "append":
        raise UsageError('displaced="defer" goes with mode="replace"; mode="append" displaces nothing')
    if displaced == "defer" and mode == "replace" and config.starved == "real":
        raise UsageError(
            'displaced="defer" delivers each real image once and has none to spare for '
            'stream.starved: real; set it to wait or reuse, or use displaced="drop"'
        )


def check_seed(seed: Any) -> int:
    if not isinstance(seed, Integral):
        raise UsageError(f"seed is an integer, got {seed!r}")
    return int(seed)


def check_synthetic_only(ratio_given: bool, epoch_steps: Any, size: Any, config: StreamConfig) -> None:
    """Of a loader without real images, with `size` images per batch."""
    if not isinstance(epoch_steps, Integral) or epoch_steps < 1:
        raise UsageError(
            "without a real loader the epoch has no end: StreamLoader(None, stream, "
            f"epoch_steps=1000), got epoch_steps={epoch_steps!r}"
        )
    if not isinstance(size, Integral) or size < 1:
        raise UsageError(f"batch_size is a number of images from 1, got {size!r}")
    if ratio_given:
        raise UsageError("without a real loader every image is synthetic: leave ratio out")
    if config.starved == "real":
        raise UsageError("stream.starved: real needs a real loader to fill from; set it to wait or reuse")

"""The order of the real images: what it follows from, where it is the same however many ranks share an epoch."""

from typing import Any

import torch.distributed as dist
from torch.utils.data import BatchSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

_DISTRIBUTED = ("DistributedSampler", "StatefulDistributedSampler")  # torchdata's; others may deal out differently


def in_group() -> bool:
    """Whether this process is one of several in torch's default process group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def samplers(loader: Any) -> list[Any]:
    """The samplers of a loader: its own, and those inside its batch sampler, however it is wrapped."""
    found = [getattr(loader, "sampler", None)]
    inner = getattr(loader, "batch_sampler", None)
    while inner is not None and len(found) < 8:
        found.append(getattr(inner, "sampler", None))
        inner = getattr(inner, "batch_sampler", None)
    return [sampler for sampler in found if sampler is not None]


def order_of(loader: Any) -> str | None:
    """What decides an epoch's order, if R ranks then read its first images in their first steps whatever R is.

    That holds for a DistributedSampler, for loaders that Accelerate prepared with use_seedable_sampler, and without
    shuffling. None for everything else.
    """
    prepared = accelerated(loader)
    batch_sampler = getattr(loader, "batch_sampler", None)
    if batch_sampler is not None and not (prepared or isinstance(batch_sampler, BatchSampler)):
        return None
    found = samplers(loader)
    sampler = found[-1] if found else None
    if isinstance(sampler, SequentialSampler):
        return "not shuffled" if prepared or not in_group() else None  # else every rank reads all
    if prepared:
        seed = getattr(sampler, "initial_seed", None)  # of Accelerate's SeedableRandomSampler
        return None if seed is None else f"{type(sampler).__name__} with seed {seed}"
    if type(sampler).__name__ in _DISTRIBUTED and isinstance(sampler, DistributedSampler):
        return f"DistributedSampler with seed {sampler.seed}" if sampler.shuffle else "not shuffled"
    return None


def described(loader: Any) -> str:
    """The same for a message, whether or not it is such an order."""
    found = samplers(loader)
    return order_of(loader) or f"that of {type(found[-1]).__name__ if found else type(loader).__name__}"


def images_per_batch(loader: Any) -> int | None:
    """Of a full batch on this rank; None for a loader that does not say."""
    if accelerated(loader) and isinstance(getattr(loader, "total_batch_size", None), int):
        return loader.total_batch_size // (dist.get_world_size() if in_group() else 1)
    size = getattr(loader, "batch_size", None)
    if size is None:
        size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return size if isinstance(size, int) else None


def accelerated(loader: Any) -> bool:
    """Whether Accelerate prepared it, and shares its batches among the ranks."""
    return hasattr(loader, "use_stateful_dataloader")

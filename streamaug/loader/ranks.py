"""What a loader must know of the other ranks: whose orders it reads, who reads which real images, whose state is whose.

Nothing here is a collective but `gather_state`.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from streamaug.errors import StateError, UsageError
from streamaug.stream.redeal import redeal

logger = logging.getLogger("streamaug")

RANKS_KEY = "ranks"


def in_group() -> bool:
    """Whether this process is one of several in torch's default process group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def check_stream(stream: Any) -> None:
    """Raises UsageError where every rank would be served the same synthetic images."""
    if in_group() and stream.world_size == 1:
        raise UsageError(
            f"this process is rank {dist.get_rank()} of {dist.get_world_size()} and its stream was made for one rank: "
            "all ranks would get the same images; build it after the process group, or with "
            f"rank={dist.get_rank()}, world_size={dist.get_world_size()}"
        )


def check_real(loader: Any) -> None:
    """Warn where every rank reads the whole real dataset."""
    if in_group() and getattr(loader, "_shards_num", None) == 1:  # of DALI's iterators
        logger.warning(
            "each of the %d ranks reads all real images: give DALI's reader num_shards=world_size and shard_id=rank",
            dist.get_world_size(),
        )
    if not in_group() or not isinstance(loader, DataLoader) or hasattr(loader, "use_stateful_dataloader"):
        return  # the last: Accelerate has dealt with it
    if type(loader.batch_sampler) is not BatchSampler:
        return
    sampler = loader.batch_sampler.sampler
    if type(sampler) is SequentialSampler or (type(sampler) is RandomSampler and not sampler.replacement):
        logger.warning(
            "each of the %d ranks reads all real images: give the DataLoader a DistributedSampler, pass the "
            "StreamLoader to accelerator.prepare, or add StreamCallback to Lightning's Trainer",
            dist.get_world_size(),
        )


def gather_state(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The states of all ranks in one, for checkpoints that one rank writes. Every rank must call it."""
    if not in_group():
        return state
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, state)
    return {RANKS_KEY: states}


def own_state(state: Mapping[str, Any], rank: int, world_size: int) -> Mapping[str, Any]:
    """This rank's part of what `gather_state` gave, dealt out anew where the number of ranks is another one now.

    Any other state as it is. Raises StateError where the real loader's position cannot be shared out.
    """
    if RANKS_KEY not in state:
        return state
    states = state[RANKS_KEY]
    return states[rank] if len(states) == world_size else _redealt(states, rank, world_size)


def _redealt(states: list[Any], rank: int, world_size: int) -> dict[str, Any]:
    first, saved = states[0], len(states)
    real, streams = first["real"], [one["stream"] for one in states]
    if real is None or "tensors" not in real or first["waiting"] is not None or None in streams:
        raise StateError(
            f"the state was saved by {saved} ranks and is loaded by {world_size}: that needs a plain DataLoader, "
            f'displaced="drop", and a batch delivered by every rank; start {saved} ranks'
        )
    if any((one["epoch"], one["batch"]) != (first["epoch"], first["batch"]) for one in states):
        raise StateError("the ranks' states were saved at different batches, and cannot be shared out anew")
    done = first["batch"] * saved  # a DistributedSampler deals the permutation out in turn: its beginning was read
    batch = -(-done // world_size)
    if batch * world_size != done:
        logger.warning("%d batches of real images are passed over in this epoch", batch * world_size - done)
    return {
        **first,
        "batch": batch,
        "step": first["epoch_step"] + batch,
        "counts": {name: value * saved // world_size for name, value in first["counts"].items()},
        "real": {**real, "pulled": batch, "finished": real["finished"] and batch > 0},
        "stream": redeal(streams, world_size)[rank],
    }

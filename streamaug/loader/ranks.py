"""What a loader must know of the other ranks: whose orders it reads, who reads which real images, whose state is whose.

Nothing here is a collective but `gather_state`.
"""

import logging
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from streamaug.errors import StateError, UsageError
from streamaug.loader.batch import count_rows
from streamaug.loader.interleave import deferred_length
from streamaug.loader.order import accelerated, described, images_per_batch, in_group, order_of
from streamaug.loader.state import check_version
from streamaug.stream.redeal import redeal

if TYPE_CHECKING:
    from streamaug.loader.stream_loader import StreamLoader

logger = logging.getLogger("streamaug")

RANKS_KEY = "ranks"
_OF_ONE_RANK = ("loader", "tensors", "checkpoint", "read", "seed")  # in a real loader's state
State = Mapping[str, Any]


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
    if not in_group() or not isinstance(loader, DataLoader) or accelerated(loader):
        return
    if type(loader.batch_sampler) is not BatchSampler:
        return
    sampler = loader.batch_sampler.sampler
    if type(sampler) is SequentialSampler or (type(sampler) is RandomSampler and not sampler.replacement):
        logger.warning(
            "each of the %d ranks reads all real images: give the DataLoader a DistributedSampler, pass the "
            "StreamLoader to accelerator.prepare, or add StreamCallback to Lightning's Trainer",
            dist.get_world_size(),
        )


def gather_state(state: State) -> State:
    """The states of all ranks in one, for checkpoints that one rank writes. Every rank must call it."""
    if not in_group():
        return {RANKS_KEY: [state]}
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, state)
    return {RANKS_KEY: states}


def own_state(state: State, loader: "StreamLoader") -> State:
    """This rank's part of what `gather_state` gave, dealt out anew where the number of ranks is another one now.

    Any other state as it is, unless one rank alone saved it and there are more now. Raises StateError for what is no
    state of this version, and where the images that are left of the epoch cannot be told.
    """
    rank, world_size = loader.stream.rank, loader.stream.world_size
    gathered = isinstance(state, Mapping) and isinstance(state.get(RANKS_KEY), list) and bool(state[RANKS_KEY])
    states = state[RANKS_KEY] if gathered else [state]
    for one in states:
        check_version(one)
    saved_alone = world_size > 1 and (states[0]["stream"] or {}).get("world_size") == 1
    if not gathered and not saved_alone:
        return state
    return states[rank] if len(states) == world_size else _redealt(states, loader)


def at_epoch(state: State, epoch: int, step: int) -> State:
    """The same state at the beginning of an epoch, `step` batches into the run."""
    real = None if state["real"] is None else {**state["real"], "pulled": 0, "finished": False, "iteration": epoch}
    moved = {"epoch": epoch, "batch": 0, "step": step, "epoch_step": step, "epoch_debt": state["debt"]}
    return {**state, **moved, "waiting": None, "real": real}


def _redealt(states: list[Any], loader: "StreamLoader") -> State:
    first, saved, rank, ranks = states[0], len(states), loader.stream.rank, loader.stream.world_size
    if any((one["epoch"], one["batch"]) != (first["epoch"], first["batch"]) for one in states):
        raise StateError("the ranks' states were saved at different batches, and cannot be shared out anew")
    streams = [one["stream"] for one in states]
    if None in streams and any(streams):
        raise StateError(
            f"the state was saved by {saved} ranks and is loaded by {ranks}: that needs a batch delivered by every "
            f"rank; start {saved} ranks"
        )
    if "held" in (first["stream"] or {}):
        raise StateError(
            f"the state was saved by {saved} ranks and is loaded by {ranks}: what the pipelines of a DALIStreamLoader "
            f"hold cannot be shared out anew; start {saved} ranks"
        )
    places = [(one["rank"], one["world_size"]) for one in streams if one and "rank" in one]
    if places and places != [(one, saved) for one in range(saved)]:
        raise StateError(
            "one state of each rank is needed, in their order; got those of ranks "
            + ", ".join(f"{one} of {count}" for one, count in places)
        )
    share: dict[str, Any] = {
        **first,
        "counts": {name: value * saved // ranks for name, value in first["counts"].items()},
    }
    if first["real"] is not None:
        share |= _position(states, loader)
    return share | {"stream": redeal(streams, ranks)[rank] if any(streams) else None}


def _position(states: list[Any], loader: "StreamLoader") -> dict[str, Any]:
    """What of the state follows from the real images read."""
    first, saved, rank, ranks = states[0], len(states), loader.stream.rank, loader.stream.world_size
    pulled = _batches_read(first, saved, loader)
    own = states[rank]["real"] if rank < saved else {}
    rows = images_per_batch(loader.real_loader)
    real = {name: value for name, value in first["real"].items() if name not in _OF_ONE_RANK}
    place = {
        "real": {**real, "pulled": pulled, "rows": rows, "tensors": own.get("tensors", {})},
        "identity": {**first["identity"], "batch_size": loader._identity()["batch_size"]},  # counted in images
        "batch": pulled,
    }
    if loader._deferred is not None:
        waiting, left_over = loader._deferred.shared_out([one["waiting"] for one in states], rank, ranks)
        if left_over and rank == 0:
            logger.warning("%d real images that were held back are passed over in this epoch", left_over)
        place |= {"size": rows or first["size"], "waiting": waiting}
        place["batch"] = _batches_delivered({**first, **place}, loader)
    return place | {"step": first["epoch_step"] + place["batch"]}


def _batches_read(state: State, saved: int, loader: "StreamLoader") -> int:
    """How many batches of the epoch each of the present ranks counts as read: all that any had read, rounded up."""
    real, source, ranks = state["real"], loader.real_loader, loader.stream.world_size
    rows = images_per_batch(source) if real.get("rows") else None
    size, former = (rows, real["rows"]) if rows else (1, 1)
    read, step = real["pulled"] * saved * former, size * ranks  # by all ranks: in the epoch; in one step of now
    length, pulled = _length(loader), -(-read // step)
    if real["finished"] or not pulled:
        return length if pulled and length is not None else pulled
    then, now = real.get("order"), order_of(source)
    if (length is None or pulled < length) and (now is None or then != now):
        raise StateError(
            f"the state was saved by {saved} ranks inside an epoch and is loaded by {ranks}: which real images are "
            f"left follows only from an order that is the same for both. It was {then or 'another for each number'} "
            f"and is {described(source)}; give both runs a DistributedSampler with one seed (Accelerate: "
            "DataLoaderConfiguration(use_seedable_sampler=True), Lightning: StreamCallback(any_ranks=True)), save at "
            f"the end of an epoch, or start {saved} ranks"
        )
    images = (rows and state["identity"]["real_images"]) or math.inf
    passed = min(pulled * step, images) - min(read, images)
    if passed and loader.stream.rank == 0:
        logger.warning("%d real %s are passed over in this epoch", passed, "images" if rows else "batches")
    return pulled if length is None else min(pulled, length)


def _batches_delivered(share: State, loader: "StreamLoader") -> int:
    """Under "defer": the length of the epoch without what is left to deliver."""
    assert loader._real is not None and loader._deferred is not None
    rows, size = loader._real.images()
    held = count_rows(share["waiting"]) if share["waiting"] is not None else 0
    left = max(rows - share["real"]["pulled"] * size, 0) + held
    at, begun, now = loader._shares.at, Fraction(*share["epoch_debt"]), Fraction(*share["debt"])
    whole = deferred_length(rows, size, begun, at, share["epoch_step"])
    return max(whole - deferred_length(left, size, now, at, share["step"]), 0) if share["batch"] else 0


def _length(loader: "StreamLoader") -> int | None:
    try:
        return loader._real.length() if loader._real is not None else None
    except TypeError:
        return None

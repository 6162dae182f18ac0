"""Which rank a stream is of: the orders of one run are dealt out among the ranks that train together."""

from streamaug.errors import UsageError


def own_rank(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """(rank, number of ranks): as given, else of torch's default process group, else the only one.

    Raises UsageError when one of the two is given alone, or they do not fit together.
    """
    if (rank is None) != (world_size is None):
        raise UsageError(f"rank {rank} and world_size {world_size}: give both, or neither for the process group's")
    if rank is None or world_size is None:
        import torch.distributed as dist

        in_group = dist.is_available() and dist.is_initialized()
        return (dist.get_rank(), dist.get_world_size()) if in_group else (0, 1)
    if not 0 <= rank < world_size:
        raise UsageError(f"rank {rank} of world_size {world_size}: ranks count from 0 to world_size - 1")
    return rank, world_size

"""The states of R ranks dealt out anew to another number of ranks: no order is delivered twice, none is left out."""

from collections.abc import Mapping, Sequence
from typing import Any

from streamaug.errors import StateError

State = Mapping[str, Any]
_DIFFERS = {"rank", "world_size", "undelivered", "offsets", "next_k", "empty_run", "weights", "latest_weights"}
_DIFFERS |= {"steering", "tensors", "latest_judge", "threads"}


def redeal(states: Sequence[State], world_size: int) -> list[dict[str, Any]]:
    """`Stream.state_dict` of every rank, in their order -> one state for each of `world_size` ranks.

    Batches that were not delivered to their end, planned or not, go out in ascending order, those that had been begun
    first. What feedback and acceptance had taught is rank 0's. Raises StateError for states of different runs.
    """
    first = states[0]
    for state in states:
        for key in first.keys() - _DIFFERS:
            if state[key] != first[key]:
                raise StateError(f"these are states of different runs: {key} is {first[key]} and {state[key]}")
    begun: list[tuple[list[int], int]] = []
    others: list[tuple[list[int], int]] = []
    weights: dict[str, Any] = {}
    for rank, state in enumerate(states):
        renamed = {version: int(version) * len(states) + rank for version in state["weights"]}
        weights |= {str(renamed[version]): classes for version, classes in state["weights"].items()}
        for (k, plan, judge), offset in zip(state["undelivered"], state["offsets"], strict=True):
            (begun if offset else others).append(([k, renamed[str(plan)], judge], offset))
    latest = 1 + max(map(int, weights))  # above all that undelivered orders name: new versions count up from it
    weights[str(latest)] = weights[str(int(first["latest_weights"]) * len(states))]
    end = max(state["next_k"] for state in states)
    for state in states:
        missing = range(state["next_k"], end, len(states))
        others += [([k, latest, first["latest_judge"]], 0) for k in missing]
    begun.sort()
    others.sort()
    shares = [begun[rank::world_size] + others[rank::world_size] for rank in range(world_size)]
    tensors: dict[str, Any] = {}
    for state in reversed(states):
        tensors |= state["tensors"]
    return [
        {
            **first,
            "rank": rank,
            "world_size": world_size,
            "undelivered": [order for order, _ in share],
            "offsets": [offset for _, offset in share],
            "next_k": end + (rank - end) % world_size,
            "empty_run": 0,
            "weights": weights,
            "latest_weights": latest,
            "tensors": tensors,
        }
        for rank, share in enumerate(shares)
    ]

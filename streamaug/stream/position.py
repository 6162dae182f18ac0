"""Where a stream is between two calls of `take`, and how that is saved: all that decides what comes next."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from streamaug.errors import StateError
from streamaug.orders import Weights
from streamaug.stream.arrays import as_array, as_tensor
from streamaug.stream.steering import Steering

log = logging.getLogger("streamaug")

_FORMAT = 3


@dataclass(frozen=True)
class Identity:
    """What a saved state and the stream that loads it must agree in; the number of producers is not part of
    it."""

    batch_size: int
    in_flight: int
    rank: int
    world_size: int
    threads: int  # a difference is only warned of
    judge_nbytes: int
    plan: str  # hash of all that plans and images depend on besides k and the versions
    first_judge: str | None  # hash of version 0 of the live judge


@dataclass(frozen=True)
class Position:
    undelivered: list[tuple[int, int, int]]  # (k, plan version, judge version), in the order of delivery
    offsets: list[int]  # of each, how many of its accepted images were delivered
    next_k: int
    empty_run: int  # batches without an accepted image up to here
    weights: dict[int, Weights]  # the versions that undelivered orders name, and the latest
    latest_weights: int
    row_weights: np.ndarray | None
    judges: dict[int, np.ndarray]  # likewise; version 0 is not saved
    latest_judge: int
    steering: Steering

    def state_dict(self, identity: Identity) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts, except for judges under "tensors"."""
        return {
            "format": _FORMAT,
            **asdict(identity),
            "undelivered": [list(names) for names in self.undelivered],
            "offsets": list(self.offsets),
            "next_k": self.next_k,
            "empty_run": self.empty_run,
            "weights": {str(version): kept.classes.tolist() for version, kept in self.weights.items()},
            "latest_weights": self.latest_weights,
            "row_weights": None if self.row_weights is None else self.row_weights.tolist(),
            "latest_judge": self.latest_judge,
            "steering": self.steering.state_dict(),
            "tensors": {f"judge_{version}": as_tensor(judge) for version, judge in self.judges.items() if version > 0},
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], identity: Identity) -> "Position":
        """Raises StateError when the state belongs to another run, or is not whole."""
        _require_whole(state)
        _require_same(state, identity)
        rows = None if state["row_weights"] is None else np.array(state["row_weights"], np.float64)
        weights = {
            int(version): Weights(int(version), np.array(classes, np.float64), rows)
            for version, classes in state["weights"].items()
        }
        position = cls(
            undelivered=[(k, plan, judge) for k, plan, judge in state["undelivered"]],
            offsets=list(state["offsets"]),
            next_k=state["next_k"],
            empty_run=state["empty_run"],
            weights=weights,
            latest_weights=state["latest_weights"],
            row_weights=rows,
            judges={int(name.removeprefix("judge_")): as_array(kept) for name, kept in state["tensors"].items()},
            latest_judge=state["latest_judge"],
            steering=Steering.from_state(state["steering"]),
        )
        position._require_what_it_names(identity.judge_nbytes)
        return position

    def _require_what_it_names(self, judge_nbytes: int) -> None:
        if len(self.undelivered) != len(self.offsets):
            raise _not_whole(f"it has {len(self.undelivered)} undelivered batches and {len(self.offsets)} offsets")
        for version in {self.latest_weights, *(plan for _, plan, _ in self.undelivered)} - self.weights.keys():
            raise _not_whole(f"it names weights {version}, which it does not have")
        for version in {self.latest_judge, *(judge for *_, judge in self.undelivered)} - self.judges.keys() - {0}:
            raise _not_whole(f"it names judge {version}, which is not under 'tensors'")
        for version, judge in self.judges.items():
            if len(judge) != judge_nbytes:
                raise _not_whole(f"judge {version} has {len(judge)} bytes, not {judge_nbytes}")


_NAMES = {
    "batch_size": "stream.batch_size",
    "in_flight": "stream.in_flight",
    "plan": "the plan (seed, recipes, bank or model)",
    "judge_nbytes": "the size of the judge in bytes",
    "first_judge": "the judge",
}


def _require_whole(state: Mapping[str, Any]) -> None:
    if not isinstance(state, Mapping):
        raise StateError(f"a saved state is the dict that state_dict gave; got {type(state).__name__} {state!r:.80}")
    if state.get("format") != _FORMAT:
        raise StateError(f"the saved state has format {state.get('format')!r}, this version reads format {_FORMAT}")
    kept = {field.name for each in (Identity, Position) for field in fields(each)} - {"judges"} | {"tensors"}
    for key in sorted(kept - state.keys()):
        raise _not_whole(f"it has no {key!r}")


def _not_whole(why: str) -> StateError:
    return StateError(f"the saved state is not whole: {why}; save and load all that state_dict gives")


def _require_same(state: Mapping[str, Any], identity: Identity) -> None:
    ours = asdict(identity)
    threads = ours.pop("threads")
    if state["latest_judge"] > 0 and all(judge > 0 for _, _, judge in state["undelivered"]):
        ours.pop("first_judge")  # nothing is judged with it any more
    for key, value in ours.items():
        if state.get(key) != value:
            raise StateError(
                f"the saved state belongs to another run: {_NAMES.get(key, key)} was {state.get(key)} "
                f"when it was saved and is {value} now"
            )
    if state["threads"] != threads:
        log.warning(
            "stream.threads was %s when the state was saved and is %s now: images may differ in last bits",
            state["threads"],
            threads,
        )

"""What a loader and the state it loads must agree in, and what happens to a ratio that was set while training."""

import contextlib
import hashlib
import json
import logging
from collections.abc import Mapping
from typing import Any

from streamaug.errors import StateError
from streamaug.loader.ratios import Ratio, as_config, from_config

logger = logging.getLogger("streamaug")

VERSION = 3


def identity(
    real: Any, *, kind: str, mode: str, displaced: str, seed: int, epoch_steps: int | None, size: int
) -> dict[str, Any]:
    """Plain numbers and strings. `kind`: of the real loader's state; `size`: images per batch where there is none."""
    own: dict[str, Any] = {"real_loader": None, "mode": mode, "displaced": displaced, "seed": seed}
    if real is None:
        return own | {"batch_size": size, "epoch_steps": epoch_steps}
    batch_size = getattr(real, "batch_size", None)
    own |= {"real_loader": kind, "batch_size": _number(batch_size), "real_images": None}
    with contextlib.suppress(AttributeError, TypeError, NotImplementedError):  # without a dataset, or a length of it
        own["real_images"] = _number(len(real.dataset))
    return own


def check_version(state: Any) -> None:
    """Raise StateError for what is no state, or was saved by another version of streamaug."""
    if not isinstance(state, Mapping):
        raise StateError(f"a StreamLoader's state_dict is needed, got a {type(state).__name__}")
    if state.get("version") != VERSION:
        raise StateError(
            f"a StreamLoader state of version {VERSION} is needed, got version {state.get('version')!r}: resume it "
            "with the streamaug that saved it, or load the model alone and start anew"
        )


def check(state: Mapping[str, Any], here: dict[str, Any]) -> None:
    """Raise StateError for a state of a loader with another identity: both hashes, and each thing that differs."""
    saved = state["identity"]
    different = [name for name in here if saved.get(name) != here[name]]
    if different:
        raise StateError(
            f"the state was saved by a loader of another configuration ({_digest(saved)}, this one is "
            f"{_digest(here)}):\n"
            + "\n".join(f"  {name} was {saved.get(name)!r} and is {here[name]!r} now" for name in different)
            + "\nbuild the loader as it was when the state was saved"
        )


def saved_ratio(given: Ratio, now: Ratio) -> dict[str, Any]:
    """The ratio that the loader was built with and the one in force, as numbers and dicts (None: a function)."""
    return {"given": as_config(given), "now": as_config(now)}


def loaded_ratio(saved: Mapping[str, Any] | None, given: Ratio) -> Ratio | None:
    """The ratio that was set while training and goes on; None where the loader's own holds."""
    if saved is None or saved["now"] == saved["given"]:
        return None
    if saved["given"] != as_config(given):
        logger.warning(
            "the ratio was %s when the state was saved and this loader was built with %s, which holds",
            saved["now"],
            as_config(given),
        )
        return None
    if saved["now"] is None:
        logger.warning("a function had been set as ratio while training, which no state can hold: set it again")
        return None
    logger.info("ratio %s, which had been set while training, goes on", saved["now"])
    return from_config(saved["now"])


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def _number(value: Any) -> int | None:
    return int(value) if isinstance(value, int) else None

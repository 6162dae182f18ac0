"""Arrays that users hand to a stream (lists, numpy, tensors on any device), checked and copied."""

from typing import Any

import numpy as np

from streamaug.errors import DataError, UsageError

_SHOWN = 80  # characters of what was given


def as_array(values: Any) -> np.ndarray:
    if hasattr(values, "detach"):
        tensor = values.detach().cpu()
        try:
            return tensor.numpy()
        except TypeError:  # bfloat16 and the float8s, which numpy does not have
            return tensor.float().numpy()
    if isinstance(values, list | tuple) and values and hasattr(values[0], "detach"):
        return np.array([as_array(value) for value in values])
    return np.asarray(values)


def _numbers(name: str, values: Any, dtype: type[int] | type[float]) -> np.ndarray:
    """A copy as `dtype`. Raises UsageError for what is no number, or no whole one where `dtype` is int."""
    try:
        given = as_array(values)
        if given.dtype.kind in ("biuf" if dtype is int else "biufO"):  # O: numbers with a None among them
            with np.errstate(invalid="ignore"):
                array: np.ndarray = given.astype(dtype)
            if dtype is float or (array == given).all():
                return array
    except (TypeError, ValueError):
        pass
    kind = "whole numbers" if dtype is int else "numbers"
    raise UsageError(f"{name}: needs {kind} in a list, an array or a tensor, got {_short(values)}")


def _short(values: Any) -> str:
    text = " ".join(repr(values).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."


def as_tensor(array: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(array)


def judge_bytes(state: Any, nbytes: int | None) -> np.ndarray:
    """A copy of the state, which must be uint8 [nbytes] (of any length when that is None)."""
    array = np.array(as_array(state))
    if array.dtype != np.uint8 or array.ndim != 1 or nbytes not in (None, len(array)):
        length = "" if nbytes is None else f" of {nbytes} bytes, as the first one was"
        raise UsageError(f"a judge's state is a flat uint8 array{length}; got {array.dtype} {list(array.shape)}")
    return array


def weights(name: str, values: Any, count: int) -> np.ndarray | None:
    """A copy as float64 [count], non-negative and not all 0; None stays None."""
    if values is None:
        return None
    array = _numbers(name, values, float)
    with np.errstate(over="ignore"):
        total = array.sum()
    if array.shape != (count,) or array.min() < 0 or not 0 < total < np.inf:
        raise UsageError(
            f"{name}: needs {count} finite weights of at least 0 that are not all 0, got "
            f"{list(array.shape)} values: {array.ravel()[:8].tolist()}"
        )
    return array


def feedback(labels: Any, losses: Any, ids: Any, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """(int64 [m], float64 [m]): the labels and losses of the images whose loss is finite."""
    label = _numbers("feedback's labels", labels, int).ravel()
    loss = _numbers("feedback's losses", losses, float).ravel()
    lengths = [len(label), len(loss)] + ([] if ids is None else [_numbers("feedback's ids", ids, int).size])
    if len(set(lengths)) > 1:
        raise UsageError(f"feedback needs one loss (and one id) for each label, got lengths {lengths}")
    outside = label[(label < 0) | (label >= num_classes)]
    if len(outside):
        raise DataError(f"feedback for class {outside[0]}: the classes are 0 to {num_classes - 1}")
    finite = np.isfinite(loss)
    return label[finite], loss[finite]

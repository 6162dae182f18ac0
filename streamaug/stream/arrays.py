"""Arrays that users hand to a stream (lists, numpy, tensors on any device), checked and copied."""

from typing import Any

import numpy as np

from streamaug.errors import DataError, UsageError


def as_array(values: Any) -> np.ndarray:
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


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
    array = np.array(as_array(values), np.float64)
    if array.shape != (count,) or not np.isfinite(array).all() or array.min() < 0 or array.sum() <= 0:
        raise UsageError(
            f"{name}: needs {count} finite weights of at least 0 that are not all 0, got "
            f"{list(array.shape)} values: {array.ravel()[:8].tolist()}"
        )
    return array


def feedback(labels: Any, losses: Any, ids: Any, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """(int64 [m], float64 [m]): the labels and losses of the images whose loss is finite."""
    label = as_array(labels).astype(np.int64).ravel()
    loss = as_array(losses).astype(np.float64).ravel()
    lengths = [len(label), len(loss)] + ([] if ids is None else [len(as_array(ids).ravel())])
    if len(set(lengths)) > 1:
        raise UsageError(f"feedback needs one loss (and one id) for each label, got lengths {lengths}")
    outside = label[(label < 0) | (label >= num_classes)]
    if len(outside):
        raise DataError(f"feedback for class {outside[0]}: the classes are 0 to {num_classes - 1}")
    finite = np.isfinite(loss)
    return label[finite], loss[finite]

"""How often each class comes among the real images: read off a dataset's labels and the sampler over them."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset, Subset, SubsetRandomSampler, TensorDataset, WeightedRandomSampler

from streamaug.errors import UsageError
from streamaug.loader.labels import class_names_of
from streamaug.loader.real import samplers

logger = logging.getLogger("streamaug")


class Classes:
    """The stream's classes beside those of the real loader.

    names: in the stream's order; real_names: the same in the order of the real labels, as `given` or as the dataset
    says; counts: real images of each, in the order of the real labels, None to read them from the dataset.
    """

    def __init__(self, names: Sequence[str], loader: Any, given: Sequence[str] | None, counts: Sequence[float] | None):
        self.names = list(names)
        real = given or class_names_of(getattr(loader, "dataset", None)) or names
        # Other names than the stream's are refused at the first batch.
        self.real_names = list(real) if sorted(real) == sorted(names) else self.names
        self._loader, self._counts = loader, counts

    def real_counts(self) -> list[float]:
        """How many real images each class has, in the stream's order; equal numbers where that is not known.

        Raises UsageError for counts that were given and cannot be.
        """
        counts: Any = self._counts
        if counts is None:
            counts = class_counts(self._loader, len(self.names))
        if counts is None:
            logger.warning(
                "how often each class comes among the real images is not known (the dataset has no `targets`): all are "
                "taken as equally frequent for the ratio by class; class_counts= says otherwise"
            )
            counts = [1] * len(self.names)
        if len(counts) != len(self.names) or min(counts) < 0 or not sum(counts) > 0:
            raise UsageError(
                f"class_counts is one number of real images for each of the {len(self.names)} classes, got {counts!r}"
            )
        return [float(counts[self.real_names.index(name)]) for name in self.names]


def class_counts(loader: Any, classes: int) -> np.ndarray | None:
    """float64 [classes]: real images of each class in what the loader draws, at any scale; None where unknown.

    Known for datasets with `targets` or `labels` (torchvision's), TensorDataset, Hugging Face datasets with a column
    of class labels, and Subset and ConcatDataset of these. A WeightedRandomSampler counts with its weights.
    """
    labels = labels_of(getattr(loader, "dataset", None))
    if labels is None or len(labels) == 0 or labels.min() < 0 or labels.max() >= classes:
        return None
    weights = np.ones(len(labels))
    for sampler in samplers(loader):
        if isinstance(sampler, WeightedRandomSampler):
            weights = np.asarray(sampler.weights, np.float64)
        elif isinstance(sampler, SubsetRandomSampler):
            weights = np.bincount(np.asarray(sampler.indices, np.int64), minlength=len(labels)).astype(np.float64)
    if len(weights) != len(labels):
        return None
    return np.bincount(labels, weights=weights, minlength=classes).astype(np.float64)


def labels_of(dataset: Any) -> np.ndarray | None:
    """int64 [n], one label for each of the dataset's samples without reading these; None where it does not say."""
    if isinstance(dataset, Subset):
        labels = labels_of(dataset.dataset)
        return None if labels is None else labels[np.asarray(dataset.indices, np.int64)]
    if isinstance(dataset, ConcatDataset):
        parts = [labels_of(part) for part in dataset.datasets]
        return None if any(part is None for part in parts) else np.concatenate(parts)  # type: ignore[arg-type]
    if isinstance(dataset, TensorDataset):
        return _integers(dataset.tensors[-1], len(dataset))
    for name in ("targets", "labels"):
        values = getattr(dataset, name, None)
        if values is not None and hasattr(dataset, "__len__"):
            return _integers(values, len(dataset))
    column = class_column(dataset)
    return None if column is None else _integers(dataset.with_format("numpy")[column], len(dataset))


def class_column(dataset: Any) -> str | None:
    """The column of a Hugging Face dataset that holds class labels, where there is one."""
    features = getattr(dataset, "features", None)
    if not isinstance(features, dict):
        return None
    return next((name for name, feature in features.items() if hasattr(feature, "names")), None)


def _integers(values: Any, count: int) -> np.ndarray | None:
    array = np.asarray(values)
    if array.shape != (count,) or not np.issubdtype(array.dtype, np.integer):
        return None
    return array.astype(np.int64)

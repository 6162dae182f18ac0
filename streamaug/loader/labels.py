"""Labels of synthetic images in the real batch's form, and the agreement of class names on both sides."""

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset

from streamaug.errors import MismatchError

if TYPE_CHECKING:
    from streamaug.stream.batch import SynthBatch

logger = logging.getLogger("streamaug")


class Labels:
    """Writes the stream's labels as the real loader writes its own: int [n] or [n, 1], one-hot or soft [n, classes].

    `stream_classes` and `real_classes` are the class names in label order, or None where unknown. The same
    names in another order are mapped by name (said once in the log); different names raise MismatchError.
    """

    def __init__(self, stream_classes: Sequence[str] | None, real_classes: Sequence[str] | None):
        self.classes = len(stream_classes) if stream_classes is not None else None
        self.mapping: np.ndarray | None = None  # int64 [classes]: the stream's label -> the real loader's
        if stream_classes is None or real_classes is None or list(stream_classes) == list(real_classes):
            return
        if sorted(stream_classes) != sorted(real_classes):
            raise MismatchError(
                "the class names of the real dataset and of the stream differ:\n"
                f"  real:   {len(real_classes)} classes: {_listed(real_classes)}\n"
                f"  stream: {len(stream_classes)} classes: {_listed(stream_classes)}\n"
                "if they are the same classes under other names, say which by StreamLoader(..., "
                "classes=[the stream's names in the order of the real labels])"
            )
        position = {name: label for label, name in enumerate(real_classes)}
        self.mapping = np.array([position[name] for name in stream_classes], dtype=np.int64)
        logger.info("the stream orders its classes differently from the dataset: labels are mapped by name")

    def check(self, real: torch.Tensor) -> None:
        """Raise MismatchError when the real labels cannot belong to the stream's classes."""
        if self.classes is None or len(real) == 0:
            return
        if (real.ndim == 1 or is_column(real, self.classes)) and _most(real.dtype) < self.classes - 1:
            raise MismatchError(
                "the real labels' type is too small for the classes:\n"
                f"  real:   labels {str(real.dtype).removeprefix('torch.')}, at most {_most(real.dtype)}\n"
                f"  stream: {self.classes} classes, labels 0 to {self.classes - 1}\n"
                "yield int64 labels, or make the stream's configuration (data:) cover the same classes as the dataset"
            )
        if real.ndim == 2 and not is_column(real, self.classes):
            if real.shape[1] != self.classes:
                raise MismatchError(
                    "the number of classes differs:\n"
                    f"  real:   labels [n, {real.shape[1]}]\n"
                    f"  stream: {self.classes} classes\n"
                    "make the stream's configuration (data:) cover the same classes as the dataset"
                )
            return
        low, high = int(real.min()), int(real.max())
        if low < 0 or high >= self.classes:
            raise MismatchError(
                "a label of the real batch is outside the stream's classes:\n"
                f"  real:   labels {low} to {high}\n"
                f"  stream: {self.classes} classes, labels 0 to {self.classes - 1}\n"
                "make the stream's configuration (data:) cover the same classes as the dataset"
            )

    def encode(self, synthetic: "SynthBatch", like: torch.Tensor) -> torch.Tensor:
        """The synthetic labels with the dtype and trailing shape of the real labels `like`.

        Raises MismatchError for mixed labels where the real labels cannot express a mixture.
        """
        label, label_b = synthetic.labels, synthetic.label_b
        if self.mapping is not None:
            label, label_b = self.mapping[label], self.mapping[label_b]
        mixed = np.asarray(synthetic.label_mix) > 0
        soft = like.ndim == 2 and like.is_floating_point()
        column = is_column(like, self.classes)
        if mixed.any() and not soft:
            raise MismatchError(
                f"the stream delivers mixed labels ({int(mixed.sum())} of {len(label)} in this batch) and "
                f"the real labels are {_form(like, column)}, which cannot hold a mixture; yield float labels [n, "
                "classes] (torch.nn.functional.one_hot(y, classes).float() in the dataset or collate_fn), "
                "or use recipes that do not mix classes"
            )
        if like.ndim == 1 or column:
            integer = torch.from_numpy(label).to(like.dtype)
            return integer[:, None] if column else integer
        rows = np.arange(len(label))
        weights = np.zeros((len(label), like.shape[1]), dtype=np.float32)
        weights[rows, label] = 1.0 - synthetic.label_mix
        np.add.at(weights, (rows, label_b), synthetic.label_mix)
        return torch.from_numpy(weights).to(like.dtype)


def is_column(labels: torch.Tensor, classes: int | None) -> bool:
    """Whether labels [n, 1] are integers, as DALI's readers give them, and not the one-hot rows of a single class."""
    if labels.ndim != 2 or labels.shape[1] != 1 or labels.is_floating_point():
        return False
    return classes != 1 or not bool(labels.any())


def integers(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Integer labels [n] of labels in any form that is accepted."""
    if labels.ndim == 1:
        return labels
    return labels[:, 0] if is_column(labels, classes) else labels.argmax(1)


def check_target_transform(dataset: Any) -> None:
    """Raise MismatchError where a dataset's `target_transform` takes its labels away from its own class names."""
    names, change = class_names_of(dataset), find_attribute(dataset, "target_transform")
    if not names or not callable(change):
        return
    try:
        made = [torch.as_tensor(change(label)) for label in range(len(names))]
        labels = [int(one.argmax() if one.ndim else one) for one in made]
    except Exception:  # a user's function raises what it likes for a label that no image has
        return
    if labels != list(range(len(names))):
        raise MismatchError(
            "the real dataset's target_transform changes its labels, so that they no longer number its classes:\n"
            f"  classes: {_listed(names)}\n"
            f"  labels:  {_listed(list(map(str, labels)))}\n"
            "where it puts them in another order, say StreamLoader(..., classes=[names in the order of the real "
            "labels]); where it joins classes, give the stream's configuration (data:) the joined ones, and classes="
        )


def find_attribute(dataset: Any, name: str) -> Any:
    """The attribute of a dataset, or of the one that a Subset or similar wrapper holds, or that all datasets of a
    ConcatDataset have in common; else None."""
    seen: list[Any] = []
    while dataset is not None and not any(dataset is other for other in seen):
        value = getattr(dataset, name, None)
        if value is not None:
            return value
        seen.append(dataset)
        if isinstance(dataset, ConcatDataset):
            first, *others = (find_attribute(part, name) for part in dataset.datasets)
            return first if all(first is other or first == other for other in others) else None
        dataset = getattr(dataset, "dataset", None)
    return None


def class_names_of(dataset: Any) -> list[str] | None:
    """Names of the labels in order: a dataset's `classes`, or those of a Hugging Face dataset's label column."""
    names = find_attribute(dataset, "classes")
    if not isinstance(names, list | tuple):
        features = find_attribute(dataset, "features")
        columns = features.values() if isinstance(features, dict) else ()
        names = next((feature.names for feature in columns if hasattr(feature, "names")), None)
    return [str(name) for name in names] if names else None


def _most(dtype: torch.dtype) -> float:
    """The largest label that the type holds."""
    if dtype.is_floating_point:
        return math.inf
    return 1 if dtype == torch.bool else torch.iinfo(dtype).max


def _form(labels: torch.Tensor, column: bool) -> str:
    kind = "one-hot integers" if labels.ndim == 2 and not column else "integers"
    return f"{kind} ({str(labels.dtype).removeprefix('torch.')})"


def _listed(names: Sequence[str], most: int = 12) -> str:
    shown = ", ".join(str(name) for name in names[:most])
    return shown + (", ..." if len(names) > most else "")

"""A batch's structure (tuple, list, named tuple, mapping, a list of one mapping): its fields, and other rows in it.

In the loader, between the real batch and the merged one.
"""

import copy
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from streamaug.errors import MismatchError, UsageError, nearest
from streamaug.loader.appearance import name_of
from streamaug.loader.dali_iterator import ONE_PIPELINE

Key = int | str
IDS_KEY = "synthetic_ids"
_IMAGE_NAMES = ("pixel_values", "images", "image", "img", "inputs", "input", "x")
_LABEL_NAMES = ("labels", "label", "targets", "target", "y")


@dataclass(frozen=True)
class Layout:
    """Where a batch keeps its images and labels; `extra` are its other fields with one entry per image.

    boxed: the fields are those of the mapping in a list of one, as DALI's iterators deliver it.
    """

    image_key: Key
    label_key: Key
    extra: tuple[Key, ...]
    boxed: bool = False

    @classmethod
    def detect(cls, batch: Any, image_key: Key | None = None, label_key: Key | None = None) -> "Layout":
        """Find the fields of a real batch; given keys win. Raises MismatchError when they cannot be found."""
        fields = fields_of(batch)
        image_key = _given(fields, image_key, "image_key") if image_key is not None else _find_images(fields)
        if label_key is not None:
            label_key = _given(fields, label_key, "label_key")
        else:
            label_key = _find_labels(fields, image_key)
        count = len(fields[image_key])
        extra = tuple(
            key
            for key, value in fields.items()
            if key not in (image_key, label_key) and is_rows(value) and len(value) == count
        )
        return cls(image_key, label_key, extra, _is_boxed(batch))

    def rows(self, batch: Any) -> dict[Key, Any]:
        """The fields that have one entry per image: images, labels and extras."""
        fields = fields_of(batch)
        return {key: fields[key] for key in (self.image_key, self.label_key, *self.extra)}


def fields_of(batch: Any) -> dict[Key, Any]:
    """A batch's fields by position or name. Raises MismatchError for what has no fields."""
    batch = _unboxed(batch)
    if isinstance(batch, Mapping):
        return dict(batch)
    if isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        return dict(enumerate(batch))
    raise MismatchError(
        f"the real loader yields {_describe(batch)}; a batch with labels is needed: (images, labels) or "
        '{"image": ..., "label": ...}'
    )


def rebuild(batch: Any, changed: Mapping[Key, Any], ids: torch.Tensor | None) -> Any:
    """A batch of the same type with some fields replaced, and `ids` added (last, or as "synthetic_ids").

    Of a mapping that cannot be changed it is a dict.
    """
    if _is_boxed(batch):
        return [rebuild(batch[0], changed, ids)]
    if isinstance(batch, Mapping):
        merged = copy.copy(batch) if isinstance(batch, MutableMapping) else dict(batch)
        merged.update(changed if ids is None else {**changed, IDS_KEY: ids})
        return merged
    values = [changed.get(position, value) for position, value in enumerate(batch)]
    if hasattr(batch, "_fields"):
        if ids is not None:
            raise UsageError(
                f"with_ids=True adds a field, and the named tuple {type(batch).__name__} has a fixed number; "
                "yield plain tuples or dictionaries"
            )
        return type(batch)(*values)
    if ids is not None:
        values.append(ids)
    return values if isinstance(batch, list) else tuple(values)


def count_rows(batch: Any) -> int:
    """Images in a batch: the length of its first field with entries; 0 for what has no fields."""
    batch = _unboxed(batch)
    has_fields = isinstance(batch, Iterable) and not isinstance(batch, torch.Tensor | np.ndarray)
    values = batch.values() if isinstance(batch, Mapping) else batch if has_fields else ()
    return next((len(value) for value in values if is_rows(value)), 0)


def _is_boxed(batch: Any) -> bool:
    return isinstance(batch, list) and len(batch) == 1 and isinstance(batch[0], Mapping)


def _unboxed(batch: Any) -> Any:
    return batch[0] if _is_boxed(batch) else batch


def is_rows(value: Any) -> bool:
    if isinstance(value, torch.Tensor | np.ndarray):
        return value.ndim > 0
    return isinstance(value, list | tuple)


def select(rows: Mapping[Key, Any], first: int, last: int) -> dict[Key, Any]:
    return {key: value[first:last] for key, value in rows.items()}


def copied(rows: Mapping[Key, Any]) -> dict[Key, Any]:
    """Rows that stay what they are when their loader fills the same memory again."""
    return {key: value.clone() if isinstance(value, torch.Tensor) else copy.copy(value) for key, value in rows.items()}


def concatenate(a: Mapping[Key, Any], b: Mapping[Key, Any]) -> dict[Key, Any]:
    return {key: _concatenate(a[key], b[key]) for key in a}


def mix(real: Any, synthetic: Any, at: np.ndarray, total: int) -> Any:
    """One field of the merged batch, `total` entries: synthetic ones at the places `at`, real ones elsewhere.

    With `total` real entries those at the places are replaced; with `total - len(at)` they are spread around
    them in their order. Layout, device and pinned memory of a real tensor are kept; its storage is never
    written to.
    """
    if isinstance(real, np.ndarray):
        return np.array(_mix_list(list(real), list(synthetic), at, total))
    if not isinstance(real, torch.Tensor):
        return type(real)(_mix_list(list(real), list(synthetic), at, total))
    places = torch.from_numpy(at).to(real.device)
    pinned = real.is_pinned() if real.device.type == "cpu" else False
    if len(real) == total:
        out = torch.empty_like(real, pin_memory=pinned)
        out.copy_(real)
    else:
        out = torch.empty(
            (total, *real.shape[1:]),
            dtype=real.dtype,
            device=real.device,
            pin_memory=pinned,
            memory_format=memory_format(real),
        )
        out[torch.from_numpy(_others(at, total)).to(real.device)] = real
    out[places] = synthetic.to(real.device)
    return out


def memory_format(images: torch.Tensor) -> torch.memory_format:
    """channels_last for a batch of images [n, C, H, W] laid out so, else contiguous."""
    if images.ndim != 4 or images.is_contiguous():
        return torch.contiguous_format
    channels_last = images.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def _concatenate(a: Any, b: Any) -> Any:
    if isinstance(a, torch.Tensor):
        return torch.cat([a, b])
    if isinstance(a, np.ndarray):
        return np.concatenate([a, b])
    return type(a)([*a, *b])


def _mix_list(real: list, synthetic: list, at: np.ndarray, total: int) -> list:
    positions = range(total) if len(real) == total else _others(at, total).tolist()
    out = [None] * total
    for position, value in zip(positions, real, strict=True):
        out[position] = value
    for position, value in zip(at.tolist(), synthetic, strict=True):
        out[position] = value
    return out


def _others(at: np.ndarray, total: int) -> np.ndarray:
    free = np.ones(total, dtype=bool)
    free[at] = False
    return np.flatnonzero(free)


def _given(fields: dict[Key, Any], key: Key, name: str) -> Key:
    if key in fields:
        return key
    known = ", ".join(repr(field) for field in fields)
    raise MismatchError(
        f"{name}={key!r} is no field of the batch{nearest(str(key), map(str, fields))}; its fields: {known}"
    )


def _find_images(fields: dict[Key, Any]) -> Key:
    candidates = [key for key, value in fields.items() if isinstance(value, torch.Tensor) and value.ndim >= 3]
    named = [name for name in _IMAGE_NAMES if name in candidates]
    if named or candidates:
        return (named or candidates)[0]
    raise MismatchError(
        f"no images found in the batch ({_summary(fields)}); expected a tensor [n, C, H, W]{_conversion(fields)}, or "
        "name it: image_key="
    )


def _find_labels(fields: dict[Key, Any], image_key: Key) -> Key:
    count = len(fields[image_key])

    def fits(value: Any) -> bool:
        if not isinstance(value, torch.Tensor) or value.ndim not in (1, 2) or len(value) != count:
            return False
        return value.ndim == 2 or not value.is_floating_point()

    candidates = [key for key, value in fields.items() if key != image_key and fits(value)]
    named = [name for name in _LABEL_NAMES if name in candidates]
    if named or candidates:
        return (named or candidates)[0]
    if fields[image_key].ndim == 3 and any(_is_number(value) for value in fields.values()):
        raise MismatchError(
            f"the real loader yields single samples ({_summary(fields)}) and batches are needed: wrap a DataLoader "
            "with a batch_size (batch_size=None is for datasets that yield whole batches)"
        )
    raise MismatchError(
        f"a batch without labels ({_summary(fields)}); expected integers [n] or one-hot/soft labels [n, "
        f"classes] beside the images{_conversion(fields)}, or name the field: label_key="
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, torch.Tensor) and value.ndim == 0)


def _conversion(fields: Mapping[Key, Any]) -> str:
    """How to make tensors of what is none, where that may be what is missing."""
    if all(isinstance(value, Mapping) for value in fields.values()):
        inside = [value for mapping in fields.values() for value in mapping.values()]
        if any(isinstance(value, torch.Tensor) and value.ndim >= 4 for value in inside):
            return f" (a batch of each of {len(fields)} DALI pipelines: {ONE_PIPELINE})"
        return " (samples: torch.utils.data.default_collate makes a batch of them)"
    if any(
        isinstance(one, torch.Tensor) for value in fields.values() if isinstance(value, list | tuple) for one in value
    ):
        return " (tensors inside a list or tuple: let the collate_fn give each its own field)"
    if any(isinstance(value, np.ndarray) for value in fields.values()):
        return " (arrays: torch.from_numpy in the collate_fn)"
    if any(isinstance(value, list | tuple) and value and isinstance(value[0], str) for value in fields.values()):
        return (
            " (class names or other text: let the dataset return the number of the class, as classes.index(name) does)"
        )
    if any(isinstance(value, list | tuple) for value in fields.values()):
        return ' (lists: torch.tensor in the collate_fn; Hugging Face datasets: with_format("torch"))'
    return ""


def _summary(fields: Mapping[Key, Any]) -> str:
    return ", ".join(f"{key!r}: {_describe(value)}" for key, value in fields.items())


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{name_of(value.dtype)} {list(value.shape)}"
    return f"a {type(value).__name__}"

"""Whether real and synthetic items can go together: their fields, shapes, dtypes and the range of the pixels.

For the mixers that never see a whole batch's transform: a graph of nodes, a DALI pipeline.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from streamaug.errors import MismatchError
from streamaug.loader.transforms import Appearance


class Agreement:
    """Compares the first items of both sides: a sample (image [C, H, W], ...) or a batch (images [n, C, H, W], ...).

    `fix` ends the message of the MismatchError. `range_images`: how many images of each side are seen before the
    range of their values is judged; 0 leaves it alone.
    """

    def __init__(self, fix: str, range_images: int = 0):
        self._needed, self._fix = range_images, fix
        self._kinds: list[dict[Any, str]] = [{}, {}]  # by side: real, synthetic
        self._seen = [0, 0]
        self._ranges = [(0.0, 0.0), (0.0, 0.0)]

    def observe(self, item: Any, synthetic: bool) -> bool:
        """True when nothing is left to compare. Raises MismatchError."""
        fields = _fields(item)
        if not self._kinds[synthetic]:
            self._kinds[synthetic] = {key: _kind(value, fields) for key, value in fields.items()}
            if all(self._kinds) and self._kinds[0] != self._kinds[1]:
                self._refuse(*map(_listed, self._kinds))
        images = next((value for value in fields.values() if _is_image(value)), None)
        if images is None or not self._needed:
            return all(self._kinds)
        seen, (low, high) = Appearance.of(images), self._ranges[synthetic]
        self._ranges[synthetic] = min(low, seen.low), max(high, seen.high)
        self._seen[synthetic] += len(images) if images.ndim == 4 else 1
        if min(self._seen) < self._needed:
            return False
        self._check_range()
        return True

    def _check_range(self) -> None:
        """Refused are factors above 8 (0 to 255 beside 0 to 1), and values well below 0 on one side alone."""
        sizes = [max(-low, high) for low, high in self._ranges]
        signed = [low < -0.02 * size for (low, _), size in zip(self._ranges, sizes, strict=True)]
        if max(sizes) > 8 * min(sizes) or signed[0] != signed[1]:
            self._refuse(*(f"values {low:.3g} to {high:.3g}" for low, high in self._ranges))

    def _refuse(self, real: str, synthetic: str) -> None:
        raise MismatchError(
            f"real and synthetic images differ:\n  real:      {real}\n  synthetic: {synthetic}\n{self._fix}"
        )


def _fields(item: Any) -> dict[Any, Any]:
    if isinstance(item, Mapping):
        return dict(item)
    if isinstance(item, Sequence) and not isinstance(item, str | bytes):
        return dict(enumerate(item))
    return {0: item}


def _is_image(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim >= 3


def _kind(value: Any, fields: Mapping[Any, Any]) -> str:
    """What two items must share to be collated: dtype and shape of a tensor (without a batch's length), or a type."""
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    shape: list[Any] = list(value.shape)
    if shape and any(_is_image(other) and other.ndim == 4 for other in fields.values()):
        shape[0] = "n"
    return f"{str(value.dtype).removeprefix('torch.')} [{', '.join(map(str, shape))}]"


def _listed(kinds: Mapping[Any, str]) -> str:
    return ", ".join(f"{key!r}: {kind}" for key, kind in kinds.items())

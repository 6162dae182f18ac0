"""Labelled real images from the configured source: what prior, bank, judge and trainer start from."""

from typing import TYPE_CHECKING, Any

from streamaug.data.images import ImageSet, Splits
from streamaug.data.load import as_image_set, load_splits

if TYPE_CHECKING:
    from streamaug.data.dataset import ImageDataset

__all__ = ["ImageDataset", "ImageSet", "Splits", "as_image_set", "load_splits"]


def __getattr__(name: str) -> Any:
    """`ImageDataset` is imported when first asked for: it needs torch, everything else here does not."""
    if name == "ImageDataset":
        from streamaug.data.dataset import ImageDataset

        return ImageDataset
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Labelled real images from the configured source: what prior, bank, judge and trainer start from."""

from typing import TYPE_CHECKING, Any

from streamaug.data.images import ImageSet, Splits
from streamaug.data.load import as_image_set, load_splits

if TYPE_CHECKING:
    from streamaug.data.dataset import Batches, ImageDataset, pixels

__all__ = ["Batches", "ImageDataset", "ImageSet", "Splits", "as_image_set", "load_splits", "pixels"]


def __getattr__(name: str) -> Any:
    """What needs torch is imported when first asked for; everything else here does not."""
    if name in ("Batches", "ImageDataset", "pixels"):
        from streamaug.data import dataset

        return getattr(dataset, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""The training script's side: a wrapper around the user's own loader that mixes the stream into it."""

from typing import TYPE_CHECKING, Any

from streamaug.loader import ratios
from streamaug.loader.losses import mixed_cross_entropy, mixed_weights
from streamaug.loader.stats import LoaderStats
from streamaug.loader.stream_loader import StreamLoader

if TYPE_CHECKING:
    from streamaug.loader.dali import DALIStreamLoader as DALIStreamLoader
    from streamaug.loader.dali import stream_source as stream_source
    from streamaug.loader.nodes import Mix as Mix
    from streamaug.loader.nodes import StreamNode as StreamNode

__all__ = [
    "DALIStreamLoader",
    "LoaderStats",
    "Mix",
    "StreamLoader",
    "StreamNode",
    "mixed_cross_entropy",
    "mixed_weights",
    "ratios",
    "stream_source",
]


def __getattr__(name: str) -> Any:
    """What needs torchdata's nodes or DALI is imported when first used."""
    if name in ("Mix", "StreamNode"):
        from streamaug.loader import nodes

        return getattr(nodes, name)
    if name in ("DALIStreamLoader", "stream_source"):
        from streamaug.loader import dali

        return getattr(dali, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

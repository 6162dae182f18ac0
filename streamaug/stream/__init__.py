"""The ring between trainer and producers, and the stream that is its trainer's end."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streamaug.stream.batch import SynthBatch as SynthBatch
    from streamaug.stream.rates.stats import StreamStats as StreamStats
    from streamaug.stream.stream import Stream as Stream

__all__ = ["Stream", "StreamStats", "SynthBatch"]


def __getattr__(name: str) -> Any:
    """Imported when first used: a producer, which lives in this package, needs none of them."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from streamaug.stream import batch, stream
    from streamaug.stream.rates import stats

    return {"Stream": stream.Stream, "StreamStats": stats.StreamStats, "SynthBatch": batch.SynthBatch}[name]

"""The training script's side: a wrapper around the user's own loader that mixes the stream into it."""

from streamaug.loader.stream_loader import LoaderStats, StreamLoader

__all__ = ["LoaderStats", "StreamLoader"]

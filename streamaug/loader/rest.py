"""The rest of an epoch, for frameworks that pass over the batches done before a resume."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streamaug.loader.stream_loader import StreamLoader


class RestOfEpoch:
    """An epoch of a StreamLoader without its first batches; everything else is the loader's.

    A loader that a state put inside the epoch is where it is to be, whatever is counted elsewhere.
    """

    def __init__(self, loader: "StreamLoader", first: int):
        self.loader = loader
        self.first = loader._batch if loader._resumed and loader._batch else first

    def __iter__(self) -> Iterator[Any]:
        return self.loader._iterate(self.first)

    def __len__(self) -> int:
        return max(len(self.loader) - self.first, 0)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "loader":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.loader, name)

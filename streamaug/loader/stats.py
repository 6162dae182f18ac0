"""What a loader has delivered, in figures."""

from dataclasses import asdict, dataclass
from typing import Any

COUNTS = ("batches", "real", "synthetic", "displaced", "shortfall")  # those that a resumed run goes on with


@dataclass
class LoaderStats:
    """Images delivered since the run began, and seconds spent since this process began."""

    batches: int = 0
    real: int = 0
    synthetic: int = 0
    displaced: int = 0  # real images dropped to make room
    shortfall: int = 0  # synthetic images planned but not there (`starved: real`)
    take_seconds: float = 0.0  # in Stream.take, waiting included
    transform_seconds: float = 0.0
    mix_seconds: float = 0.0

    @property
    def realised_ratio(self) -> float:
        delivered = self.real + self.synthetic
        return self.synthetic / delivered if delivered else 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"realised_ratio": self.realised_ratio}

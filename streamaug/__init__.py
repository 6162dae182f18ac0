"""Train image classifiers on an endless stream of fresh synthetic images, with one changed line.

import streamaug as sa

stream = sa.Stream.from_config("digits")
loader = sa.StreamLoader(real_loader, stream, ratio=0.5)
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from streamaug.lazy import lazily

if TYPE_CHECKING:
    from streamaug.bank import LatentBank as LatentBank
    from streamaug.config import Config as Config
    from streamaug.config import load as load
    from streamaug.data import ImageSet as ImageSet
    from streamaug.errors import StreamaugError as StreamaugError
    from streamaug.inverting import invert as invert
    from streamaug.loader import DALIStreamLoader as DALIStreamLoader
    from streamaug.loader import Mix as Mix
    from streamaug.loader import StreamLoader as StreamLoader
    from streamaug.loader import StreamNode as StreamNode
    from streamaug.loader import mixed_cross_entropy as mixed_cross_entropy
    from streamaug.loader import mixed_weights as mixed_weights
    from streamaug.loader import ratios as ratios
    from streamaug.loader import stream_source as stream_source
    from streamaug.orders import OrderBatch as OrderBatch
    from streamaug.orders import Planner as Planner
    from streamaug.preparation import prepare as prepare
    from streamaug.sampling.sampler import Sampler as Sampler
    from streamaug.stream import Stream as Stream

try:
    __version__ = version("streamaug")
except PackageNotFoundError:  # imported from a checkout that was never installed
    __version__ = "0.0.0"

# Imported when first used: a producer, the command line's --help and a spawned worker need few of them.
_PUBLIC = {
    "Config": "streamaug.config",
    "DALIStreamLoader": "streamaug.loader",
    "ImageSet": "streamaug.data",
    "LatentBank": "streamaug.bank",
    "Mix": "streamaug.loader",
    "OrderBatch": "streamaug.orders",
    "Planner": "streamaug.orders",
    "Sampler": "streamaug.sampling.sampler",
    "Stream": "streamaug.stream",
    "StreamLoader": "streamaug.loader",
    "StreamNode": "streamaug.loader",
    "StreamaugError": "streamaug.errors",
    "integrations": "streamaug.integrations",
    "invert": "streamaug.inverting",
    "load": "streamaug.config",
    "mixed_cross_entropy": "streamaug.loader",
    "mixed_weights": "streamaug.loader",
    "prepare": "streamaug.preparation",
    "ratios": "streamaug.loader",
    "stream_source": "streamaug.loader",
}
__all__ = sorted(_PUBLIC)
__getattr__ = lazily(__name__, _PUBLIC)


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]

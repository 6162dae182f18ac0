"""The places images come from, one module each."""

import importlib

from streamaug.config import DataConfig
from streamaug.data.source import Source


def open_source(config: DataConfig) -> tuple[Source, Source | None]:
    """The images to learn from, and the held-out ones where they have a place of their own; none is decoded yet.

    Raises DataError when they are not where the configuration says, MissingExtra for a package that is not installed.
    """
    name = "imported" if "." in config.source else config.source
    module = importlib.import_module(f"streamaug.data.sources.{name}")
    return module.open_source(config)

"""Data set classes by their import path, such as torchvision's, and data set objects whose items are (image, label)."""

import importlib
import operator
import pkgutil
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from streamaug.config import DataConfig
from streamaug.data.decode import Unreadable, array_image
from streamaug.data.source import Source
from streamaug.errors import DataError, nearest

# What reading a damaged image raises inside a data set; anything else is taken for a fault of the data set.
_DAMAGED = (OSError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def open_source(config: DataConfig) -> tuple[Source, Source | None]:
    """The class called with `options`; with `test_options` in addition (and test_root for root) for held-out images.

    `root`, where it is given, is passed as an option of that name. Raises DataError when the class cannot be imported
    or constructed, or when what it makes is no data set.
    """
    factory = _import(config.source)
    options = ({} if config.root is None else {"root": str(config.root)}) | config.options
    dataset = _construct(factory, config.source, options, "data.options")
    source = items_source(dataset, config.source, f"{config.source}/train")
    if config.test_options is None and config.test_root is None:
        return source, None
    if config.test_root is not None:
        options |= {"root": str(config.test_root)}
    options |= config.test_options or {}
    dataset = _construct(factory, config.source, options, "data.test_options")
    return source, items_source(dataset, f"{config.source} with test_options", f"{config.source}/test")


def items_source(dataset: Any, where: str, name: str) -> Source:
    """The items of a map-style data set.

    Images are called by their files where the data set has `samples` or `imgs`, else "name/0", "name/1", ... Raises
    DataError when it has no length or cannot be indexed; `fetch` raises it for an item that is no (image, int).
    """
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")) or isinstance(dataset, str | bytes | dict):
        raise DataError(
            f"{where}: a {type(dataset).__name__} is no data set with __len__ and __getitem__, whose items are "
            "(image, label); such a class, a list, a Hugging Face Dataset or a folder is accepted"
        )

    def fetch(i: int) -> tuple[Image.Image, int]:
        try:
            item = dataset[i]
        except _DAMAGED as error:
            raise Unreadable(str(error) or type(error).__name__) from None
        except Exception as error:
            raise DataError(f"{where}: item {i} raised {type(error).__name__}: {error}") from error
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise DataError(f"{where}: item {i} is {_describe(item)}; expected (image, label)")
        try:
            image = _image(item[0])
        except ValueError as error:
            raise DataError(f"{where}: the image of item {i} is {error}") from None
        try:
            return image, operator.index(item[1])
        except TypeError:
            raise DataError(
                f"{where}: the label of item {i} is {_describe(item[1])}; expected an int, the number of its class"
            ) from None

    names = _files(dataset) or [f"{name}/{i}" for i in range(len(dataset))]
    return Source(where=where, names=names, fetch=fetch, class_names=_classes(dataset))


def _image(item: Any) -> Image.Image:
    """A PIL image of what a data set gives as one. Raises ValueError, whose message says what it is instead."""
    if isinstance(item, Image.Image):
        return item
    if isinstance(item, np.ndarray):
        return array_image(item, channels_first=False)
    if hasattr(item, "detach"):  # a tensor, without importing torch
        tensor = item.detach().cpu()
        return array_image((tensor.float() if tensor.is_floating_point() else tensor).numpy(), channels_first=True)
    raise ValueError(f"{_describe(item)}; expected a PIL image, an array [H, W, C] or a tensor [C, H, W]")


def _classes(dataset: Any) -> list[str] | None:
    """The names in `classes`; a name in several words, as ImageNet's, is joined by commas."""
    named = dataset if hasattr(dataset, "classes") else _whole(dataset)[0]
    classes = getattr(named, "classes", None)
    if not isinstance(classes, list | tuple) or not classes:
        return None
    return [", ".join(name) if isinstance(name, tuple | list) else str(name) for name in classes]


def _files(dataset: Any) -> list[str] | None:
    """The file of each item, where the data set knows them."""
    whole, chosen = _whole(dataset)
    for name in ("samples", "imgs"):
        samples = getattr(whole, name, None)
        if (
            isinstance(samples, list)
            and len(samples) == len(whole)
            and all(isinstance(s, tuple | list) for s in samples)
        ):
            return [str(samples[i][0]) for i in chosen]
    return None


def _whole(dataset: Any) -> tuple[Any, Sequence[int]]:
    """The data set that a torch Subset is a part of, and which of its items the part has."""
    chosen: Sequence[int] = range(len(dataset))
    while hasattr(dataset, "dataset") and hasattr(dataset, "indices"):
        chosen = [int(dataset.indices[i]) for i in chosen]
        dataset = dataset.dataset
    return dataset, chosen


def _construct(factory: Any, source: str, options: dict[str, Any], key: str) -> Any:
    try:
        return factory(**options)
    except Exception as error:
        given = ", ".join(f"{name}={value!r}" for name, value in options.items())
        raise DataError(
            f"{key}: {source.rpartition('.')[2]}({given}) raised {type(error).__name__}: {error}"
        ) from error


def _import(path: str) -> Any:
    """The object at a dotted import path."""
    parts = path.split(".")
    found: Any = None
    for position, part in enumerate(parts):
        parent = ".".join(parts[:position])
        if position and hasattr(found, part):
            found = getattr(found, part)
            continue
        dotted = f"{parent}.{part}" if parent else part
        try:
            found = importlib.import_module(dotted)
        except ModuleNotFoundError as error:
            if error.name not in (dotted, parent):
                raise DataError(f"data.source: importing {dotted} raised {type(error).__name__}: {error}") from error
            modules = [module.name for module in pkgutil.iter_modules(getattr(found, "__path__", None))]
            hint = nearest(part, {*modules, *dir(found)} if position else modules)
            where = f"{parent} has no '{part}'" if position else f"no module '{part}'"
            raise DataError(
                f"data.source: cannot import {path}: {where}{hint}; modules are found where Python looks for them: "
                "install the package, or put its folder into PYTHONPATH"
            ) from None
        except Exception as error:
            raise DataError(f"data.source: importing {dotted} raised {type(error).__name__}: {error}") from error
    if not callable(found):
        raise DataError(f"data.source: {path} is {_describe(found)}; expected the class of a data set")
    return found


def _describe(value: Any) -> str:
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"a {type(value).__name__} of shape {list(shape)}"
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:60] + '...'} ({type(value).__name__})"

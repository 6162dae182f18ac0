"""From a configuration, or from the user's own data set, to labelled images, decoded."""

import logging
import os
from collections.abc import Sized
from pathlib import Path
from typing import Any

import numpy as np

from streamaug.config import SOURCES, DataConfig
from streamaug.data.divide import divide, without
from streamaug.data.images import ImageSet, Splits
from streamaug.data.source import BadFiles, Classes, Source, read
from streamaug.data.sources import open_source
from streamaug.errors import DataError

log = logging.getLogger("streamaug")


def load_splits(config: DataConfig, seed: int = 0) -> Splits:
    """Load the images a configuration names and divide them into train, validation and test.

    Every class is in every set that is not empty, in proportion. Where an image goes is decided by its class, its name
    and `seed`, so it does not move when the folder does, when `image_size` changes, or (but for a few) when images are
    added. Leave `seed` alone: all runs then hold out the same images, whatever their own seed. Where held-out images
    have a place of their own (`test_root`, `test_options`, the format's own test set), they are the test set and
    `holdout` is not used. The source "classes" gives three empty sets that know the classes' names.

    A train or validation image whose pixels occur in the test set is dropped, as is a train image whose pixels occur in
    the validation set; `Splits.notes` counts them and names the files that were skipped. Raises DataError on a folder,
    class, file or share that cannot be used, MissingExtra when the source needs a package that is not installed.
    """
    if config.source == "classes":
        nothing = _only_classes(config)
        return Splits(nothing, nothing, nothing)
    source, held_out = open_source(config)
    bad = BadFiles(config.max_bad)
    classes = Classes.of(source, config.class_names)
    held_classes = None if held_out is None else classes.held_out(source, held_out)
    rest = _read_all_classes(source, classes, config, bad)
    if held_out is None or held_classes is None:
        test, rest = divide(rest, config.holdout, "holdout", seed)
    else:
        # Names that the data do not have follow from the training labels.
        test = _read_all_classes(held_out, Classes(rest.class_names, held_classes.positions), config, bad)
    validation, train = divide(rest, config.validation, "validation", seed)

    notes = [*source.notes, *(held_out.notes if held_out else ()), *bad.notes()]
    validation = without(validation, test.hashes, "validation", "a test", notes)
    train = without(train, test.hashes, "train", "a test", notes)
    train = without(train, validation.hashes, "train", "a validation", notes)
    repeated = len(train) - len(set(train.hashes))
    if repeated:
        notes.append(f"{repeated} train images repeat the pixels of another train image (kept)")
    contradicting = len(set(zip(train.hashes, train.labels.tolist(), strict=True))) - len(set(train.hashes))
    if contradicting:
        notes.append(f"{contradicting} train images have the pixels of an image of another class (kept)")
    return Splits(train, validation, test, notes)


def as_image_set(dataset: Any, config: DataConfig) -> ImageSet:
    """All labelled images of a data set that exists in Python, not divided.

    dataset: an ImageSet (returned as it is), a torchvision-like data set or a list, whose items are (image, label), a
    Hugging Face Dataset, or a path that `data.source` can read (a folder per class unless it says otherwise). Images
    are PIL images, or arrays [H, W] or [H, W, C], or tensors [C, H, W], uint8 or floats in [0, 1]; labels are ints.
    Each item is read once: a random transform inside the data set is applied once. Of `config`, image_size, channels,
    fit, class_names and max_bad apply, for Hugging Face also image_key and label_key.

    Skipped images are logged. Raises DataError on anything that is no such data set, naming the item.
    """
    if isinstance(dataset, ImageSet):
        return dataset
    source = _given_source(dataset, config)
    bad = BadFiles(config.max_bad)
    images = read(source, Classes.of(source, config.class_names), config, bad)
    for note in [*source.notes, *bad.notes()]:
        log.warning("%s", note)
    return images


def _given_source(dataset: Any, config: DataConfig) -> Source:
    if isinstance(dataset, str | os.PathLike):
        name = config.source if SOURCES.get(config.source) else "folder"
        return open_source(config.model_copy(update={"source": name, "root": Path(dataset), "test_root": None}))[0]
    if hasattr(dataset, "features") and hasattr(dataset, "column_names") and isinstance(dataset, Sized):
        from streamaug.data.sources.huggingface import table_source

        return table_source(dataset, type(dataset).__name__, config)
    from streamaug.data.sources.imported import items_source

    return items_source(dataset, type(dataset).__name__, f"{type(dataset).__name__}/data")


def _read_all_classes(source: Source, classes: Classes, config: DataConfig, bad: BadFiles) -> ImageSet:
    """Like `read`, but every class must have an image."""
    images = read(source, classes, config, bad)
    missing = np.flatnonzero(images.class_counts() == 0)
    if len(missing):
        listing = f":\n{bad.listing()}" if bad.files else ""
        raise DataError(f"{source.where}: no readable image of class '{images.class_names[missing[0]]}'{listing}")
    return images


def _only_classes(config: DataConfig) -> ImageSet:
    assert config.class_names is not None  # DataConfig sees to it
    repeated = [name for name in config.class_names if config.class_names.count(name) > 1]
    if repeated:
        raise DataError(f"data.class_names: '{repeated[0]}' is given twice")
    shape = (0, config.channels, config.image_size, config.image_size)
    return ImageSet.from_arrays(np.zeros(shape, np.uint8), [], config.class_names)

"""A folder written by `save_to_disk` of Hugging Face `datasets`, and a Dataset object."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from streamaug.config import DataConfig
from streamaug.data.decode import Unreadable
from streamaug.data.source import Source, Undecoded, few, no_such
from streamaug.errors import DataError, MissingExtra, nearest

_LAYOUT = "expected a folder written by save_to_disk of Hugging Face datasets"
_HELD_OUT = ("test", "validation")
_LABEL_COLUMNS = ("label", "labels", "class", "target")  # looked for, in this order, where none is a ClassLabel


def open_source(config: DataConfig) -> tuple[Source, Source | None]:
    """Split "train" of root, or its only one; held out are test_root's images, or root's split "test" or "validation".

    Raises DataError when the folder or its columns cannot be used, MissingExtra without `datasets`.
    """
    assert config.root is not None  # DataConfig sees to it
    splits = _splits(config.root)
    name = _pick(splits, ("train",), config.root)
    if config.test_root is not None:
        others = _splits(config.test_root)
        held = _pick(others, _HELD_OUT, config.test_root)
        source = table_source(splits[name], str(config.root), config, name)
        return source, table_source(others[held], str(config.test_root), config, held)
    own = next((split for split in _HELD_OUT if split in splits and split != name), None)
    unused = [split for split in splits if split not in (name, own)]
    notes = [f"{config.root}: not used: split {few(unused)}"] if unused else []
    source = table_source(splits[name], str(config.root), config, name, notes)
    return source, None if own is None else table_source(splits[own], str(config.root), config, own)


def table_source(
    dataset: Any, where: str, config: DataConfig, split: str = "data", notes: Sequence[str] = ()
) -> Source:
    """The rows of a Dataset; a format or transform set on it is not used. Raises DataError."""
    datasets = _datasets()
    dataset = dataset.with_format(None)
    image_key = _image_column(dataset, where, config.image_key, datasets)
    label_key = _label_column(dataset, where, config.label_key, datasets)
    feature = dataset.features[label_key]
    labels = dataset.select_columns([label_key])[:][label_key]
    unusable = next((i for i, label in enumerate(labels) if not isinstance(label, int | str)), None)
    if unusable is not None:
        raise DataError(
            f"{where}: '{label_key}' of row {unusable} is {labels[unusable]!r}; "
            "expected one number or one name for each image (data.label_key names another column)"
        )
    class_names = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    numbered = class_names is not None or not any(isinstance(label, str) for label in labels)
    if not numbered:
        class_names = sorted(set(labels))
        position = {name: i for i, name in enumerate(class_names)}
        labels = [position[label] for label in labels]
    try:
        images = dataset.select_columns([image_key]).cast_column(image_key, datasets.Image(decode=False))
    except Exception as error:  # pyarrow has many
        raise DataError(f"{where}: column '{image_key}' cannot be read as images: {error}") from None

    def fetch(i: int) -> tuple[Undecoded, int]:
        stored = images[i][image_key]
        if stored is None or (stored["bytes"] is None and stored["path"] is None):
            raise Unreadable("no image in this row")
        return Path(stored["path"]) if stored["bytes"] is None else stored["bytes"], labels[i]

    return Source(
        where=where,
        names=[f"{where}/{split}/{i}" for i in range(len(dataset))],
        fetch=fetch,
        class_names=class_names,
        numbered=numbered,
        in_files=True,
        notes=notes,
    )


def _splits(root: Path) -> dict[str, Any]:
    """The Dataset of each split, by name; a Dataset that is no split is called "data"."""
    if not root.exists():
        raise no_such(root, _LAYOUT)
    if not any((root / name).is_file() for name in ("dataset_dict.json", "state.json")):
        raise DataError(f"{root}: has neither dataset_dict.json nor state.json; {_LAYOUT}")
    try:
        loaded = _datasets().load_from_disk(str(root))
    except MissingExtra:
        raise
    except Exception as error:
        raise DataError(f"{root}: cannot be read: {type(error).__name__}: {error}; {_LAYOUT}") from None
    return dict(loaded) if isinstance(loaded, dict) else {str(loaded.split or "data"): loaded}


def _pick(splits: dict[str, Any], wanted: tuple[str, ...], root: Path) -> str:
    """The only split, or the first of `wanted` that is there."""
    if len(splits) == 1:
        return next(iter(splits))
    for name in wanted:
        if name in splits:
            return name
    raise DataError(f"{root}: no split {' or '.join(repr(name) for name in wanted)}; it has {few(splits)}")


def _image_column(dataset: Any, where: str, given: str | None, datasets: Any) -> str:
    columns = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    return _one_of(columns, dataset, where, given, "data.image_key", "images")


def _label_column(dataset: Any, where: str, given: str | None, datasets: Any) -> str:
    columns = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.ClassLabel)]
    if not columns:
        columns = [name for name in _LABEL_COLUMNS if name in dataset.features][:1]
    return _one_of(columns, dataset, where, given, "data.label_key", "labels")


def _one_of(columns: list[str], dataset: Any, where: str, given: str | None, key: str, what: str) -> str:
    having = few(dataset.column_names)
    if given is not None:
        if given not in dataset.column_names:
            hint = nearest(given, dataset.column_names)
            raise DataError(f"{key}: {where} has no column '{given}'{hint}; it has {having}")
        return given
    if len(columns) != 1:
        found = f"several columns of {what} ({few(columns)})" if columns else f"no column of {what} (found {having})"
        raise DataError(f"{where}: {found}; name one with {key}")
    return columns[0]


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise MissingExtra("datasets", "huggingface") from None
    return datasets

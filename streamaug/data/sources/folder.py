"""A folder with one folder of images per class."""

from pathlib import Path

from streamaug.config import DataConfig
from streamaug.data.decode import EXTENSIONS
from streamaug.data.source import Source, few, no_such, visible
from streamaug.errors import DataError

_LAYOUT = "expected one folder of images per class, such as root/cat/001.png and root/dog/001.png"


def open_source(config: DataConfig) -> tuple[Source, Source | None]:
    """root/<class>/<image>, and test_root likewise. Raises DataError."""
    assert config.root is not None  # DataConfig sees to it
    return _folder(config.root), None if config.test_root is None else _folder(config.test_root)


def _folder(root: Path) -> Source:
    files = _list_classes(root)
    paths = [(path, label) for label, members in enumerate(files.values()) for path in members]
    return Source(
        where=str(root),
        names=[str(path) for path, _ in paths],
        fetch=lambda i: paths[i],
        class_names=list(files),
        numbered=False,
        in_files=True,
    )


def _list_classes(root: Path) -> dict[str, list[Path]]:
    """The image files of each class folder, sorted; names that begin with a dot are left out."""
    if not root.exists():
        raise no_such(root, _LAYOUT)
    if not root.is_dir():
        raise DataError(f"{root}: a file; {_LAYOUT}")
    entries = visible(root)
    folders = [entry for entry in entries if entry.is_dir()]
    if not folders:
        found = f"holds {few(entry.name for entry in entries)} and no folder" if entries else "is empty"
        raise DataError(f"{root}: {found}; {_LAYOUT}")
    classes = {}
    for folder in folders:
        inside = visible(folder)
        classes[folder.name] = [path for path in inside if path.suffix.lower() in EXTENSIONS and not path.is_dir()]
        if not classes[folder.name]:
            found = few(path.name for path in inside) if inside else "nothing"
            raise DataError(
                f"{folder}: class '{folder.name}' has no image (found {found}); "
                f"accepted: {', '.join(sorted(EXTENSIONS))}, directly in the class's folder"
            )
    return classes

"""Writing an output file whole or not at all: what was there before stays until the new one is complete."""

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from streamaug.errors import StreamaugError


def write_whole(path: Path, data: bytes) -> None:
    """Make `path` hold `data`, or leave it as it was and raise StreamaugError with the reason."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise StreamaugError(
            f"{path}: cannot be written: {error.strerror} ({len(data) / 1e3:.0f} kB needed); make room there, or "
            "choose another --out"
        ) from None


def write_json(report: Mapping[str, Any], path: Path) -> None:
    """Write figures to `path`, whole or not at all; what is not finite becomes null."""
    write_whole(path, (json.dumps(plain(report), indent=2, allow_nan=False) + "\n").encode())


def plain(value: Any) -> Any:
    """The value as JSON has it: numpy numbers as numbers, what is not finite as null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

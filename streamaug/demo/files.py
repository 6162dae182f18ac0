"""Writing an output file whole or not at all: what was there before stays until the new one is complete."""

import os
import tempfile
from pathlib import Path

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

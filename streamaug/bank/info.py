"""What is in a bank, as plain values."""

from typing import Any

import numpy as np

from streamaug.bank.files import file_entries
from streamaug.bank.reader import LatentBank

_QUANTILES = {"min": 0.0, "p5": 0.05, "median": 0.5, "p95": 0.95, "max": 1.0}


def info(bank: LatentBank) -> dict[str, Any]:
    """Rows by class, parts with their settings, tensors, quantiles of row arrays and bytes on disk: JSON-plain."""
    counts = np.bincount(bank.labels, minlength=len(bank.class_names)).tolist()
    return {
        "path": str(bank.path),
        "rows": bank.num_rows,
        "classes": dict(zip(bank.class_names, counts, strict=True)),
        "meta": bank.meta,
        "parts": [_part(part) for part in bank.index["parts"]],
        "row_arrays": {name: _quantiles(bank.row_array(name)) for name in bank.row_arrays},
        "bytes": sum(entry["bytes"] for entry in file_entries(bank.index)),
        "files": len(file_entries(bank.index)),
        "edits": bank.edits,
        "digest": bank.digest,
    }


def _part(part: dict[str, Any]) -> dict[str, Any]:
    """A part of the index without its list of files."""
    shards = part["shards"]
    plain = {key: value for key, value in part.items() if key != "shards"}
    return plain | {"shards": len(shards), "bytes": sum(entry["bytes"] for entry in shards)}


def _quantiles(values: np.ndarray) -> dict[str, float]:
    found = np.quantile(values.astype(np.float64), list(_QUANTILES.values())).tolist()
    return dict(zip(_QUANTILES, found, strict=True)) | {"mean": float(values.mean(dtype=np.float64))}

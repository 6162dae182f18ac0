"""Which rows of a bank are near which: the table that recipes with `pairs: nearest` draw partners from."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from streamaug.bank.files import write_atomically
from streamaug.bank.reader import LatentBank
from streamaug.errors import BankError

_CHUNK = 256  # rows whose distances are measured at once
_BLOCK_BYTES = 1 << 28  # of their class's rows as fp32, to which they are measured at once


def nearest_rows(bank: LatentBank, count: int, cache: Path) -> np.ndarray:
    """The `count` rows of the class nearest to each row, nearest first: int32 [R, count], -1 where there are fewer.

    Near is the Euclidean distance of "latent", or, in a bank without, of "inverted" or of the embeddings. Kept in the
    folder `cache`, named by the bank. Raises BankError for a bank without tensors.
    """
    names = [name for name in ("latent", "inverted", *bank.tensors_of("embedding")) if name in bank.tensor_names]
    if not names:
        raise BankError(f"{bank.path}: its rows hold no tensors to measure a distance by")
    file = cache / f"neighbours-{bank.digest[:16]}-{count}.safetensors"
    try:
        return load_file(file)["rows"].numpy()
    except (OSError, SafetensorError, KeyError):
        table = _measure(bank, names[0], count)
    cache.mkdir(parents=True, exist_ok=True)
    # The cache has no lock: another process may be writing its own table there.
    with tempfile.TemporaryDirectory(dir=cache, prefix=".neighbours-") as work:
        write_atomically(file, save({"rows": torch.from_numpy(table)}), Path(work))
    return table


def _measure(bank: LatentBank, name: str, count: int) -> np.ndarray:
    table = np.full((bank.num_rows, count), -1, dtype=np.int32)
    block = max(_BLOCK_BYTES // (4 * bank.gather(name, [0]).numel()), _CHUNK) if bank.num_rows else _CHUNK
    for label in range(len(bank.class_names)):
        rows = np.flatnonzero(bank.labels == label)
        there = min(count, len(rows) - 1)
        if there < 1:
            continue
        near = torch.full((len(rows), there), torch.inf)  # distances, ascending
        found = torch.zeros((len(rows), there), dtype=torch.int64)  # indices into rows
        for first in range(0, len(rows), block):
            others = bank.gather(name, rows[first : first + block]).float().flatten(1)
            for begin in range(0, len(rows), _CHUNK):
                at = slice(begin, begin + _CHUNK)
                distance = torch.cdist(bank.gather(name, rows[at]).float().flatten(1), others)
                index = torch.arange(first, first + len(others))
                distance[torch.arange(begin, begin + len(distance))[:, None] == index] = torch.inf
                distance = torch.cat([near[at], distance], dim=1)
                index = torch.cat([found[at], index.expand(len(distance), -1)], dim=1)
                near[at], chosen = distance.topk(there, largest=False, sorted=True)
                found[at] = index.gather(1, chosen)
        table[rows, :there] = rows[found.numpy()]
    return table

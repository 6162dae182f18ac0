"""Which rows of a bank are near which: the table that recipes with `pairs: nearest` draw partners from."""

from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from streamaug.bank.files import write_atomically
from streamaug.bank.reader import LatentBank
from streamaug.errors import BankError

_CHUNK = 256  # rows whose distances to their class are held at once


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
    write_atomically(file, save({"rows": torch.from_numpy(table)}), cache)
    return table


def _measure(bank: LatentBank, name: str, count: int) -> np.ndarray:
    table = np.full((bank.num_rows, count), -1, dtype=np.int32)
    for label in range(len(bank.class_names)):
        rows = np.flatnonzero(bank.labels == label)
        there = min(count, len(rows) - 1)
        if there < 1:
            continue
        values = bank.gather(name, rows).float().flatten(1)
        for begin in range(0, len(rows), _CHUNK):
            distance = torch.cdist(values[begin : begin + _CHUNK], values)
            own = torch.arange(len(distance))
            distance[own, own + begin] = torch.inf
            nearest = distance.topk(there, largest=False, sorted=True).indices.numpy()
            table[rows[begin : begin + _CHUNK], :there] = rows[nearest]
    return table

"""Small banks of two parts whose tensors depend on nothing but the row's source and the part's settings."""

import hashlib
from pathlib import Path

import numpy as np
import torch

from streamaug.bank import BankPlan, BankWriter, Checkpoint, LatentBank, Part

ROWS, SHARD = 23, 6
ENCODE = Part("encode", {"model": "m1"}, group_rows=3)  # 8 groups, the last of 2 rows; 4 shards
EMBEDDING = Part("embedding", {"model": "m1", "lr": 0.1}, group_rows=5, dtype="bfloat16")  # 5 groups; 5 shards
STEPS = 3  # of the embedding's "optimisation", each of which is kept in a checkpoint
CLASSES = ["cat", "dog", "emu"]
TENSORS = ["latent", "code", "tokens"]
ARRAYS = ["encode.score", "embedding.loss"]


def make_plan(changed: dict[int, str] | None = None, rows: int = ROWS, **settings) -> BankPlan:
    """Rows whose source hash is the sha256 of their number, or of what `changed` says."""
    return plan_of([(changed or {}).get(row, str(row)) for row in range(rows)], **settings)


def plan_of(sources: list[str], **settings) -> BankPlan:
    rows = len(sources)
    values = {
        "labels": np.arange(rows) % 3,
        "source_hashes": [hashlib.sha256(source.encode()).hexdigest() for source in sources],
        "source_names": [f"images/{row}.png" for row in range(rows)],
        "class_names": CLASSES,
        "meta": {"model": "m1", "image_shape": [1, 4, 4]},
        "parts": [ENCODE, EMBEDDING],
        "shard_rows": SHARD,
    }
    return BankPlan(**(values | settings))


def compute(plan: BankPlan, part: str, rows: np.ndarray, checkpoint: Checkpoint | None = None) -> dict:
    """The part's tensors of these rows."""
    seeds = [_seed(plan.source_hashes[row], plan.part(part).meta) for row in rows]
    if part == "embedding":
        return _optimise(seeds, checkpoint or Checkpoint(None))
    latent = torch.stack([torch.from_numpy(np.random.default_rng(seed).normal(size=(2, 3, 3))) for seed in seeds])
    return {
        "latent": latent,
        "code": torch.tensor([[seed % 97, seed % 89] for seed in seeds]),
        "encode.score": latent.flatten(1).mean(1),
    }


def write(path: Path, plan: BankPlan, computed: list[str] | None = None) -> LatentBank:
    """Write the bank; `computed` collects the groups that were computed, as "encode 3"."""
    with BankWriter(path, plan) as writer:
        write_pending(writer, computed)
        return writer.finish()


def write_pending(writer: BankWriter, computed: list[str] | None = None) -> None:
    for part in writer.plan.parts:
        for group in writer.pending(part.name):
            if computed is not None:
                computed.append(f"{part.name} {group.number}")
            checkpoint = writer.checkpoint(part.name, group)
            writer.put(part.name, group, compute(writer.plan, part.name, group.padded, checkpoint))


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def shard_of(path: Path, number: int, part: str = "encode") -> Path:
    return next(path.glob(f"{part}-{number:05d}-*"))


def make_nan(file: Path, name: str, row: int, row_bytes: int) -> None:
    """Put a float16 NaN into a row of a shard's tensor."""
    import json

    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    at = start + json.loads(data[8:start])[name]["data_offsets"][0] + row * row_bytes
    data[at : at + 2] = b"\x00\x7e"
    file.write_bytes(data)


def _seed(source_hash: str, meta: dict) -> int:
    return int.from_bytes(hashlib.sha256((source_hash + str(sorted(meta.items()))).encode()).digest()[:4], "big")


def _optimise(seeds: list[int], checkpoint: Checkpoint) -> dict:
    state = checkpoint.load() or {"step": torch.tensor(0), "tokens": torch.zeros(len(seeds), 2, 4)}
    tokens = state["tokens"]
    for step in range(int(state["step"]), STEPS):
        update = [np.random.default_rng([seed, step]).normal(size=(2, 4)) for seed in seeds]
        tokens = tokens * 0.5 + torch.from_numpy(np.stack(update)).float()
        checkpoint.save({"step": torch.tensor(step + 1), "tokens": tokens})
    return {"tokens": tokens, "embedding.loss": tokens.flatten(1).square().mean(1)}

"""Encoded prompts, and what a prompt family's images are conditioned on: a wording, or bank rows of the same shape."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from streamaug.errors import ModelError
from streamaug.orders import OrderBatch
from streamaug.sampling.denoisers.base import Conditioning, Rows

NULL = "null."


class PromptTooLong(Exception):
    """A prompt has more tokens than the encoder takes. position: which of the texts given."""

    def __init__(self, position: int, tokens: int, limit: int):
        super().__init__(f"text {position} has {tokens} tokens, the encoder takes {limit}")
        self.position, self.tokens, self.limit = position, tokens, limit


class PromptTable:
    """Encoded prompts: `embeddings[name]` is [classes, templates, ...], `null[name]` the negative prompt's [...]."""

    def __init__(self, embeddings: dict[str, torch.Tensor], null: dict[str, torch.Tensor]):
        self.embeddings, self.null = embeddings, null

    @classmethod
    def load(cls, path: Path, device: torch.device, dtype: torch.dtype) -> "PromptTable":
        tensors = {name: value.to(device, dtype) for name, value in load_file(path).items()}
        embeddings = {name: value for name, value in tensors.items() if not name.startswith(NULL)}
        null = {name.removeprefix(NULL): value for name, value in tensors.items() if name.startswith(NULL)}
        return cls(embeddings, null)

    def lookup(self, labels: np.ndarray, templates: np.ndarray) -> Rows:
        """The embeddings of labels int [B] and templates int [B], each [B, ...], and "null." + name, each [...]."""
        found = {}
        for name, table in self.embeddings.items():
            at = (torch.from_numpy(each.astype(np.int64)).to(table.device) for each in (labels, templates))
            found[name] = table[tuple(at)]
            found[NULL + name] = self.null[name]
        return found


def prompt_conditioning(order: OrderBatch, rows: Rows, table: PromptTable | None, guided: bool) -> Conditioning:
    """By name [B, ...], or [2B, ...] with the null condition first when guided.

    Orders of template -1 take the batch's bank rows (inverted embeddings; their null is `rows["null.NAME"]`, the
    mean), the others their class's prompt. Raises ModelError when what they need is not there.
    """
    images = order.images
    if (images["template"] < 0).all():
        if not rows:
            raise ModelError("the recipe is conditioned on inverted embeddings, but the bank has none")
        source = rows
    elif table is None:
        raise ModelError("the recipe is conditioned on prompts, but none were encoded")
    else:
        source = table.lookup(images["label"], images["template"])
    names = [name for name in source if not name.startswith(NULL)]
    if not guided:
        return {name: source[name] for name in names}
    null = {name: source[NULL + name].expand_as(source[name]) for name in names}
    return {name: torch.cat([null[name], source[name]]) for name in names}


def tokenize(tokenizer: Any, texts: list[str], limit: int) -> torch.Tensor:
    """Token ids int64 [N, limit], padded. Raises PromptTooLong instead of cutting a prompt short."""
    for position, ids in enumerate(tokenizer(texts, truncation=False, padding=False).input_ids):
        if len(ids) > limit:
            raise PromptTooLong(position, len(ids), limit)
    return tokenizer(texts, padding="max_length", max_length=limit, truncation=False, return_tensors="pt").input_ids

"""Prompts: texts encoded by CLIP, class tokens included, and what a prompt family's images are conditioned on.

That is a wording's embedding, or bank rows of the same shape.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from streamaug.errors import MissingExtra, ModelError
from streamaug.orders import OrderBatch
from streamaug.sampling.denoisers.base import (
    NULL,
    Conditioning,
    Denoiser,
    Rows,
    by_rows,
    mixed,
    mixed_rows,
    read_json,
    row_halves,
    weight_files,
)

_TEXTS_AT_ONCE = 32
_RESIDENT_BYTES = 1 << 28  # of encoded prompts, at most this much is kept on the device: two thousand of CLIP's
_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel")
_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast", "T5Tokenizer", "T5TokenizerFast")


class PromptTooLong(Exception):
    """A prompt has more tokens than the encoder takes. position: which of the texts given."""

    def __init__(self, position: int, tokens: int, limit: int):
        super().__init__(f"text {position} has {tokens} tokens, the encoder takes {limit}")
        self.position, self.tokens, self.limit = position, tokens, limit


class PromptTable:
    """Encoded prompts: `embeddings[name]` is [classes, templates, ...], `null[name]` the negative prompt's [...].

    The embeddings may be kept elsewhere, and in another dtype, than the nulls: those say where a batch needs its rows.
    """

    def __init__(self, embeddings: dict[str, torch.Tensor], null: dict[str, torch.Tensor]):
        self.embeddings, self.null = embeddings, null

    @classmethod
    def load(cls, path: Path, device: torch.device, dtype: torch.dtype) -> "PromptTable":
        """From `encode_prompts`' file: wholly on the device where they are few, else memory-mapped.

        A T5 makes 4 MB of a prompt in half precision, so that of a thousand only those in use can be there.
        """
        tensors = load_file(path)  # mapped from the file, not read
        null = {name.removeprefix(NULL): value for name, value in tensors.items() if name.startswith(NULL)}
        embeddings = {name: value for name, value in tensors.items() if not name.startswith(NULL)}
        if sum(value.numel() for value in embeddings.values()) * dtype.itemsize <= _RESIDENT_BYTES:
            embeddings = {name: value.to(device, dtype) for name, value in embeddings.items()}
        return cls(embeddings, {name: value.to(device, dtype) for name, value in null.items()})

    def lookup(self, labels: np.ndarray, templates: np.ndarray) -> Rows:
        """The embeddings of labels int [B] and templates int [B], each [B, ...], and "null." + name, each [...]."""
        found = {}
        for name, table in self.embeddings.items():
            null = self.null[name]
            rows = labels.astype(np.int64) * table.shape[1] + templates
            prompts = table.flatten(0, 1)
            if table.device == null.device and table.dtype == null.dtype:
                found[name] = prompts[torch.from_numpy(rows).to(table.device)]
            else:
                used, inverse = np.unique(rows, return_inverse=True)
                brought = prompts[torch.from_numpy(used)].to(null.device, null.dtype)
                found[name] = brought[torch.from_numpy(inverse.reshape(-1)).to(null.device)]
            found[NULL + name] = null
        return found


def prompt_conditioning(
    order: OrderBatch, rows: Rows, table: PromptTable | None, guided: bool, names: Sequence[str] | None = None
) -> Conditioning:
    """By name [B, ...], or [2B, ...] with the null condition first when guided.

    Orders of template -1 take the batch's bank rows (inverted embeddings; their null is `rows["null.NAME"]`, the
    mean), the others their class's prompt. names: the embeddings that the network takes; by default all there are.
    Raises ModelError when what they need is not there.
    """
    source = rows
    if not by_rows(order):
        if table is None:
            raise ModelError("the recipe is conditioned on prompts, but none were encoded")
        look = partial(table.lookup, templates=order.images["template"])
        source = mixed_rows(order, look) if mixed(order) else look(order.images["label"])
    return row_halves(source, names or [name for name in source if not name.startswith(NULL)], guided)


class Prompted(Denoiser):
    """A denoiser that is told prompts. embeddings: the names of the encoded prompts that its network takes."""

    embeddings: tuple[str, ...] = ("tokens",)
    prompts: PromptTable | None = None

    def class_rows(self, labels: np.ndarray) -> dict[str, torch.Tensor]:
        """The classes' prompts in the first wording."""
        if self.prompts is None:
            raise ModelError("inverted embeddings start from the class's prompt, but no prompts were encoded")
        found = self.prompts.lookup(labels, np.zeros_like(labels))
        return {name: found[name] for name in self.embeddings}


def tokenize(tokenizer: Any, texts: list[str], limit: int) -> torch.Tensor:
    """Token ids int64 [N, limit], padded. Raises PromptTooLong instead of cutting a prompt short."""
    return token_batch(tokenizer, texts, limit).input_ids


def token_batch(tokenizer: Any, texts: list[str], limit: int) -> Any:
    """`tokenize`'s ids as `input_ids`, and `attention_mask`, int64 [N, limit], 0 where padded."""
    for position, ids in enumerate(tokenizer(texts, truncation=False, padding=False, verbose=False).input_ids):
        if len(ids) > limit:
            raise PromptTooLong(position, len(ids), limit)
    return tokenizer(texts, padding="max_length", max_length=limit, truncation=False, return_tensors="pt")


@torch.no_grad()
def encode_clip(
    path: Path,
    component: str,
    texts: Sequence[str],
    *,
    variant: str | None = None,
    device: torch.device,
    penultimate: bool = False,
    class_tokens: Mapping[str, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [N, L, D] and pooled embeddings [N, P] of the texts, fp32 on the CPU.

    component: "text_encoder" with "tokenizer", "text_encoder_2" with "tokenizer_2", and so on; the encoder is freed
    before the function returns. penultimate: the hidden states are those before the last layer, not normalised.
    class_tokens: `read_class_tokens`' vectors by token. Raises ModelError and PromptTooLong.
    """
    tokenizer = load_tokenizer(path, component.replace("text_encoder", "tokenizer"))
    encoder = load_text_encoder(path, component, variant, device)
    texts = _with_class_tokens(tokenizer, encoder, list(texts), class_tokens or {})
    limit = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
    batch = token_batch(tokenizer, texts, limit)
    masked = getattr(encoder.config, "use_attention_mask", False)
    hidden, pooled = [], []
    for at in range(0, len(texts), _TEXTS_AT_ONCE):
        ids, mask = (batch[key][at : at + _TEXTS_AT_ONCE].to(device) for key in ("input_ids", "attention_mask"))
        out = encoder(ids, attention_mask=mask if masked else None, output_hidden_states=penultimate)
        hidden.append((out.hidden_states[-2] if penultimate else out.last_hidden_state).float().cpu())
        pooled.append((out.text_embeds if "text_embeds" in out else out.pooler_output).float().cpu())
    return torch.cat(hidden), torch.cat(pooled)


def read_class_tokens(files: Sequence[Path], widths: Mapping[str, int]) -> dict[str, dict[str, torch.Tensor]]:
    """Textual-inversion embeddings: by encoder, then by token, vectors fp32 [n, D].

    files: safetensors with one tensor, whose name is the token (as diffusers saves it; named "emb_params", the
    token is the file's name), or with one tensor for each encoder, named by it. widths: of each encoder, the D it
    takes, by the name it has in such files ("clip_l", "clip_g"). A single tensor goes to the encoders of its width.
    Raises ModelError.
    """
    found: dict[str, dict[str, torch.Tensor]] = {name: {} for name in widths}
    for file in files:
        try:
            tensors = {name: value.float() for name, value in load_file(file).items()}
        except (OSError, SafetensorError) as error:
            raise ModelError(f"model.class_tokens {file}: cannot be read as safetensors: {error}") from None
        if tensors and set(tensors) <= set(widths):
            token, parts = file.stem, tensors
        elif len(tensors) == 1:
            ((name, vectors),) = tensors.items()
            token = file.stem if name == "emb_params" else name
            fitting = [encoder for encoder, width in widths.items() if vectors.shape[-1] == width]
            parts = dict.fromkeys(fitting or widths, vectors)
        else:
            raise ModelError(
                f"model.class_tokens {file}: expected one tensor named by its token, or {' and '.join(widths)}; found "
                f"{', '.join(sorted(tensors)) or 'nothing'}"
            )
        for encoder, vectors in parts.items():
            if vectors.dim() not in (1, 2) or vectors.shape[-1] != widths[encoder]:
                raise ModelError(
                    f"model.class_tokens {file}: the embedding is {list(vectors.shape)}, this model's text encoder "
                    f"takes [vectors, {' or '.join(str(width) for width in widths.values())}]"
                )
            if token in found[encoder]:
                raise ModelError(f"model.class_tokens {file}: the token {token!r} is given twice")
            found[encoder][token] = vectors.reshape(-1, vectors.shape[-1])
    return found


def _with_class_tokens(
    tokenizer: Any, encoder: Any, texts: list[str], class_tokens: Mapping[str, torch.Tensor]
) -> list[str]:
    """Add the tokens to tokenizer and encoder; the texts with each token of n vectors written as n tokens."""
    if not class_tokens:
        return texts
    written = {
        token: [token, *(f"{token}_{i}" for i in range(1, len(vectors)))] for token, vectors in class_tokens.items()
    }
    names = [name for each in written.values() for name in each]
    taken = sorted(set(names) & set(tokenizer.get_vocab()))
    if taken:
        raise ModelError(
            f"model.class_tokens: {taken[0]!r} is already a token of the model's tokenizer; give the embedding another "
            f"name, such as '<{taken[0]}>'"
        )
    tokenizer.add_tokens(names)
    rows = encoder.get_input_embeddings().weight.shape[0]
    encoder.resize_token_embeddings(max(rows, len(tokenizer)), mean_resizing=False)
    at = tokenizer.convert_tokens_to_ids(names)
    weight = encoder.get_input_embeddings().weight
    weight.data[at] = torch.cat(list(class_tokens.values())).to(weight.device, weight.dtype)
    longest_first = sorted(written, key=len, reverse=True)
    pattern = re.compile("|".join(re.escape(token) for token in longest_first))
    return [pattern.sub(lambda match: " ".join(written[match.group()]), text) for text in texts]


def load_tokenizer(path: Path, component: str) -> Any:
    """A component's tokenizer. Raises ModelError, and MissingExtra without transformers."""
    cls = _transformers_class(path, component, _TOKENIZERS)
    try:
        return cls.from_pretrained(path / component, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{path}: the tokenizer in {component} cannot be loaded: {error}") from None


def load_text_encoder(path: Path, component: str, variant: str | None, device: torch.device) -> Any:
    """A component's text encoder in fp32, safetensors only. Raises ModelError, and MissingExtra."""
    cls = _transformers_class(path, component, _ENCODERS)
    weight_files(path, component, variant)
    try:
        with _no_progress_bar():
            encoder, loading = cls.from_pretrained(
                path / component, variant=variant, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{path}: the weights of {component} cannot be loaded: {error}") from None
    if loading["missing_keys"]:
        first = sorted(loading["missing_keys"])[0]
        raise ModelError(f"{path}: {component} lacks weights that its config.json asks for, first {first}")
    return encoder.to(device, torch.float32).eval().requires_grad_(False)


def text_files(path: Path, components: Sequence[str], variant: str | None = None) -> list[Path]:
    """Text encoders' configurations and weights and their tokenizers' files. Raises ModelError for a missing one."""
    files = []
    for component in components:
        tokenizer = path / component.replace("text_encoder", "tokenizer")
        beside = sorted(file for file in tokenizer.glob("*") if file.is_file())
        if not beside:
            raise ModelError(f"{path}: no tokenizer in {tokenizer.name}; save the whole pipeline again")
        files += [path / component / "config.json", *weight_files(path, component, variant), *beside]
    return files


def text_digest_of(path: Path, components: Sequence[str], variant: str | None = None) -> str:
    """Hash of `text_files`. Raises ModelError."""
    digest = hashlib.sha256()
    for file in text_files(path, components, variant):
        try:
            with open(file, "rb") as opened:
                digest.update(file.name.encode() + hashlib.file_digest(opened, "sha256").digest())
        except OSError as error:
            raise ModelError(f"{file}: cannot be read: {error.strerror}") from None
    return digest.hexdigest()[:16]


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """transformers draws one for every load."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _transformers_class(path: Path, component: str, accepted: Sequence[str]) -> Any:
    """The class that model_index.json names for the component, one of the accepted."""
    try:
        import transformers
    except ImportError:
        raise MissingExtra("transformers", "text") from None
    name = (read_json(path, "model_index.json").get(component) or [None, None])[1]
    if name not in accepted:
        raise ModelError(f"{path}: {component} is a {name}; supported: {', '.join(accepted)}")
    return getattr(transformers, name)

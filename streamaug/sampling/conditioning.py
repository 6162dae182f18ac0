"""Prompts: every class's wordings encoded once and kept in the cache by their hash.

The text encoder is loaded here, used, and freed; a producer reads only the encoded prompts.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save

from streamaug.errors import ConfigError, ModelError
from streamaug.outputs import write_whole
from streamaug.sampling import denoisers
from streamaug.sampling.denoisers.base import ModelInfo
from streamaug.sampling.denoisers.prompts import NULL, PromptTooLong

_FORMAT = 1


def encode_prompts(
    info: ModelInfo,
    class_names: Sequence[str],
    templates: Sequence[str],
    cache: Path,
    *,
    negative: str = "",
    class_tokens: Sequence[Path] = (),
    variant: str | None = None,
    device: torch.device | None = None,
) -> Path:
    """The file of a model's encoded prompts, written now unless the cache has it.

    templates: wordings with {} where the class name goes; class_tokens: files of textual-inversion embeddings whose
    tokens they may use. Raises ConfigError for a template without {} and for a family without class tokens, and
    ModelError for a prompt that is longer than the encoder takes, naming the class.
    """
    for position, template in enumerate(templates):
        if template.count("{}") != 1:
            raise ConfigError(f"model.prompts.{position}: {template!r} needs {{}} once, where the class name goes")
    family = denoisers.FAMILIES[info.family]
    if class_tokens and not hasattr(family, "CLASS_TOKENS"):
        having = [name for name, each in denoisers.FAMILIES.items() if hasattr(each, "CLASS_TOKENS")]
        raise ConfigError(f"model.class_tokens: {info.family} takes none; accepted are models of: {', '.join(having)}")
    texts = [template.replace("{}", name) for name in class_names for template in templates]
    tokens = [(file.name, _hash(file)) for file in class_tokens]
    key = json.dumps([_FORMAT, family.text_digest(info, variant), tokens, texts, negative])
    path = cache / f"prompts-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    if path.is_file():
        return path
    device = device or torch.device("cpu")
    try:
        with_tokens = {"class_tokens": class_tokens} if class_tokens else {}
        encoded = family.encode_text(info, [*texts, negative], variant, device, **with_tokens)
    except PromptTooLong as error:
        position = error.position
        what = "model.negative_prompt"
        if position < len(texts):
            what = f"model.prompts: the prompt of class '{class_names[position // len(templates)]}'"
        raise ModelError(
            f"{what} has {error.tokens} tokens, the text encoder takes {error.limit}: shorten the template or the name"
        ) from None
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
    tensors = {}
    for name, rows in encoded.items():
        tensors[name] = rows[:-1].reshape(len(class_names), len(templates), *rows.shape[1:]).contiguous()
        tensors[NULL + name] = rows[-1].contiguous()
    cache.mkdir(parents=True, exist_ok=True)
    write_whole(path, save(tensors))
    return path


def _hash(file: Path) -> str:
    try:
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"model.class_tokens {file}: cannot be read: {error.strerror}") from None

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
    variant: str | None = None,
    device: torch.device | None = None,
) -> Path:
    """The file of a model's encoded prompts, written now unless the cache has it.

    templates: wordings with {} where the class name goes. Raises ConfigError for a template without it, and
    ModelError for a prompt that is longer than the encoder takes, naming the class.
    """
    for position, template in enumerate(templates):
        if template.count("{}") != 1:
            raise ConfigError(f"model.prompts.{position}: {template!r} needs {{}} once, where the class name goes")
    family = denoisers.FAMILIES[info.family]
    texts = [template.replace("{}", name) for name in class_names for template in templates]
    key = json.dumps([_FORMAT, family.text_digest(info, variant), texts, negative])
    path = cache / f"prompts-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    if path.is_file():
        return path
    try:
        encoded = family.encode_text(info, [*texts, negative], variant, device or torch.device("cpu"))
    except PromptTooLong as error:
        position = error.position
        whose = f"class '{class_names[position // len(templates)]}'" if position < len(texts) else "negative_prompt"
        raise ModelError(
            f"model.prompts: the prompt of {whose} has {error.tokens} tokens, the text encoder takes "
            f"{error.limit}: shorten the template or the class name"
        ) from None
    tensors = {}
    for name, rows in encoded.items():
        tensors[name] = rows[:-1].reshape(len(class_names), len(templates), *rows.shape[1:]).contiguous()
        tensors[NULL + name] = rows[-1].contiguous()
    cache.mkdir(parents=True, exist_ok=True)
    write_whole(path, save(tensors))
    return path

"""Prompts: every class's wordings encoded once and kept in the cache by their hash.

The text encoder is loaded here, used, and freed; a producer reads only the encoded prompts.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path

import torch
from safetensors.torch import save

from streamaug.errors import ConfigError, ModelError, nearest
from streamaug.outputs import write_whole
from streamaug.sampling import denoisers
from streamaug.sampling.denoisers.base import ModelInfo
from streamaug.sampling.denoisers.prompts import NULL, PromptTooLong

_log = logging.getLogger("streamaug")

_FORMAT = 1

Templates = Sequence[str] | Mapping[str, Sequence[str]]


def encode_prompts(
    info: ModelInfo,
    class_names: Sequence[str],
    templates: Templates,
    cache: Path,
    *,
    negative: str = "",
    class_tokens: Sequence[Path] = (),
    variant: str | None = None,
    device: torch.device | None = None,
) -> Path:
    """The file of a model's encoded prompts, written now unless the cache has it.

    templates: as for `wordings`; class_tokens: files of textual-inversion embeddings whose tokens they may use. Raises
    ConfigError for templates that do not fit the classes and for a family without class tokens, and ModelError for a
    prompt that is longer than the encoder takes, naming the class.
    """
    prompts = wordings(templates, class_names)
    family = denoisers.FAMILIES[info.family]
    if class_tokens and not hasattr(family, "CLASS_TOKENS"):
        having = [name for name, each in denoisers.FAMILIES.items() if hasattr(each, "CLASS_TOKENS")]
        raise ConfigError(f"model.class_tokens: {info.family} takes none; accepted are models of: {', '.join(having)}")
    each = len(prompts[0])
    texts = [text for of_class in prompts for text in of_class]
    if hasattr(family, "cleaned"):
        *texts, negative = family.cleaned(info, [*texts, negative])
    _warn_of_equals(class_names, texts)
    tokens = [(file.name, _hash(file)) for file in class_tokens]
    key = json.dumps([_FORMAT, family.text_digest(info, variant), tokens, texts, negative])
    path = cache / f"prompts-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    if path.is_file():
        return path

    def named(position: int) -> str:
        if position == len(texts):
            return "model.negative_prompt"
        return f"model.prompts: the prompt of class '{class_names[position // each]}'"

    device = device or torch.device("cpu")
    try:
        with_tokens = {"class_tokens": class_tokens} if class_tokens else {}
        encoded = family.encode_text(info, [*texts, negative], variant, device, **with_tokens)
    except PromptTooLong as error:
        raise ModelError(
            f"{named(error.position)} has {error.tokens} tokens, the text encoder takes {error.limit}: "
            "shorten the template or the name"
        ) from None
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
    tensors = {}
    zero = not negative and hasattr(family, "null_is_zero") and family.null_is_zero(info)
    for name, rows in encoded.items():
        broken = (~torch.isfinite(rows)).flatten(1).any(1).nonzero()
        if len(broken):
            raise ModelError(
                f"{named(int(broken[0]))} is encoded as NaN or infinity: the text encoder of {info.path} is damaged"
            )
        tensors[name] = rows[:-1].reshape(len(class_names), each, *rows.shape[1:]).contiguous()
        tensors[NULL + name] = torch.zeros_like(rows[-1]) if zero else rows[-1].contiguous()
    cache.mkdir(parents=True, exist_ok=True)
    write_whole(path, save(tensors))
    return path


def wordings(templates: Templates, class_names: Sequence[str]) -> list[list[str]]:
    """The prompts of each class, as many for every class: where one has fewer, they come again.

    templates: wordings with {} where the class name goes; or such lists by class name, and "default" for the classes
    without one, where {} may be missing. Raises ConfigError.
    """
    if not isinstance(templates, Mapping):
        return [_filled(templates, name, "model.prompts") for name in class_names]
    unknown = sorted(templates.keys() - {*class_names, "default"})
    if unknown:
        accepted = [*class_names[:20], "default"]
        raise ConfigError(
            f"model.prompts: no class '{unknown[0]}'{nearest(unknown[0], accepted)}; accepted: {', '.join(accepted)}"
        )
    missing = [name for name in class_names if name not in templates]
    if missing and "default" not in templates:
        raise ConfigError(f"model.prompts: class '{missing[0]}' has none; add it, or default: [a photo of a {{}}]")
    found = [
        _filled(templates[name], name, f"model.prompts.{name}", optional=True)
        if name in templates
        else _filled(templates["default"], name, "model.prompts.default")
        for name in class_names
    ]
    most = max(map(len, found))
    return [list(islice(cycle(each), most)) for each in found]


def _filled(templates: Sequence[str], name: str, key: str, *, optional: bool = False) -> list[str]:
    for position, template in enumerate(templates):
        if template.count("{}") > 1 or ("{}" not in template and not optional):
            once = "at most once" if optional else "once"
            raise ConfigError(f"{key}.{position}: {template!r} needs {{}} {once}, where the class name goes")
    return [template.replace("{}", name) for template in templates]


def _warn_of_equals(class_names: Sequence[str], texts: Sequence[str]) -> None:
    """Says once which classes a model that is told these prompts cannot tell apart: those whose wordings are the same.

    texts: as many of each class, one class after the other.
    """
    each = len(texts) // len(class_names)
    first: dict[tuple[str, ...], str] = {}
    for position, name in enumerate(class_names):
        wording = tuple(texts[position * each : (position + 1) * each])
        if first.setdefault(wording, name) != name:
            _log.warning("classes '%s' and '%s' have the same prompt, '%s'", first[wording], name, wording[0])
            return


def _hash(file: Path) -> str:
    try:
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"model.class_tokens {file}: cannot be read: {error.strerror}") from None

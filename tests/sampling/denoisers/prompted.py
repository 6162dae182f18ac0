"""What the tests of prompt families share: orders, an adapter loaded from a folder, and its images' distance."""

import sys
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from streamaug.kernels.philox import normal

from streamaug.orders import ORDER_DTYPE, OrderBatch
from streamaug.sampling.conditioning import encode_prompts
from streamaug.sampling.denoisers import FAMILIES, Denoiser, LoadSettings, inspect, load, load_scheduler
from streamaug.sampling.sampler import Sampler

CLASSES = ["cat", "dog", "fire engine"]
TEMPLATES = ["a photo of a {}", "{}, up close"]
NEGATIVE = "blurry"
CPU = torch.device("cpu")


def orders(batch_size: int, *, start: int = 0, guidance: Any = 1.0, template: int | None = None) -> OrderBatch:
    """Labels and wordings in turn; template=-1 asks for inverted embeddings."""
    images = np.zeros(batch_size, ORDER_DTYPE)
    images["id"] = np.arange(batch_size)
    images["label"] = np.arange(batch_size) % len(CLASSES)
    images["template"] = np.arange(batch_size) % len(TEMPLATES) if template is None else template
    images["guidance"] = guidance
    return OrderBatch(0, start, 0, 0, images)


def texts_of(order: OrderBatch) -> list[str]:
    """The prompts that a pipeline is given for the order."""
    return [TEMPLATES[image["template"]].format(CLASSES[image["label"]]) for image in order.images]


def adapter(folder: Path, negative: str = NEGATIVE, **settings: Any) -> Denoiser:
    """The folder's denoiser on the CPU with its prompts encoded."""
    info = inspect(folder)
    prompts = encode_prompts(info, CLASSES, TEMPLATES, folder / "cache", negative=negative)
    return load(info, LoadSettings(CPU, prompts=prompts, **settings))


def sampler(folder: Path, steps: int, **settings: Any) -> Sampler:
    return Sampler(adapter(folder, **settings), load_scheduler(folder), steps)


def noise(shape: tuple[int, ...], seed: int = 5) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def deviation(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, in standard deviations of theirs."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.std())


def give_our_noise(monkeypatch: Any, scheduler: Any, order: OrderBatch) -> None:
    """From now on the scheduler's class draws, step by step, the noise that the sampler draws for the order."""
    steps = count()
    ids = torch.from_numpy(order.images["id"].copy())

    def drawn(shape: tuple[int, ...], **kwargs: Any) -> torch.Tensor:
        assert shape[0] == len(order)
        return normal(ids, shape[1:], seed=0, stream=1, step=next(steps))

    monkeypatch.setattr(sys.modules[type(scheduler).__module__], "randn_tensor", drawn)


def encoded(folder: Path, texts: list[str], **class_tokens: Any) -> dict[str, torch.Tensor]:
    info = inspect(folder)
    return FAMILIES[info.family].encode_text(info, texts, None, CPU, **class_tokens)

"""The training loop, on one screen: it takes any batches and knows nothing of where they come from."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from streamaug.config import TrainConfig
from streamaug.training.augment import augment


@dataclass
class TrainResult:
    """accuracy: fraction in [0, 1] on the evaluation images (NaN without any); curve: (step, accuracy) pairs;
    spans: (start, end) seconds of each step's computation, on time.monotonic's clock."""

    accuracy: float
    steps: int
    seconds: float
    curve: list[tuple[int, float]] = field(default_factory=list)
    spans: list[tuple[float, float]] = field(default_factory=list)


def forever(loader: Iterable) -> Iterator:
    """The loader's batches, epoch after epoch."""
    while True:
        batch = None
        for batch in loader:
            yield batch
        if batch is None:
            raise ValueError("the loader is empty: it needs at least one batch")


def train(
    model: nn.Module,
    batches: Iterable,
    config: TrainConfig,
    *,
    seed: int,
    test: Iterable | None = None,
    eval_every: int | None = None,
    on_step: Callable[[int, float | None], None] | None = None,
    deadline_seconds: float | None = None,
) -> TrainResult:
    """Train `model` in place for config.steps optimizer steps (or until the deadline) on (images, labels) batches.

    images: [B, C, H, W] in [0, 1]; labels: int64 [B], or probabilities [B, classes]; test: batches of the evaluation
    images, gone through at each evaluation. AdamW with one learning-rate cycle. `on_step(step, accuracy or None)` is
    called after each step. Runs with config.threads CPU threads: the producer has the others, and small networks gain
    nothing from more.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        return _train(model, batches, config, seed, test, eval_every, on_step, deadline_seconds)
    finally:
        torch.set_num_threads(threads)


def _train(
    model: nn.Module,
    batches: Iterable,
    config: TrainConfig,
    seed: int,
    test: Iterable | None,
    eval_every: int | None,
    on_step: Callable[[int, float | None], None] | None,
    deadline_seconds: float | None,
) -> TrainResult:
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    began = time.monotonic()
    result = TrainResult(float("nan"), 0, 0.0)
    source = iter(batches)
    step = 0
    while step < config.steps or deadline_seconds is not None:
        elapsed = time.monotonic() - began
        if deadline_seconds is not None and elapsed >= deadline_seconds:
            break
        progress = step / config.steps if deadline_seconds is None else elapsed / deadline_seconds
        for group in optimizer.param_groups:
            group["lr"] = config.lr * one_cycle(progress)
        images, labels = next(source)
        step_began = time.monotonic()
        model.train()
        logits = model(augment(images, config.augment, random))
        loss = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step += 1
        result.spans.append((step_began, time.monotonic()))
        reached = None
        if test is not None and eval_every and step % eval_every == 0 and step < config.steps:
            reached = accuracy(model, test)
            result.curve.append((step, reached))
        if on_step:
            on_step(step, reached)
    result.steps = step
    result.seconds = time.monotonic() - began
    if test is not None:
        result.accuracy = accuracy(model, test)
        result.curve.append((step, result.accuracy))
    return result


def one_cycle(progress: float, warm: float = 0.1) -> float:
    """Linear warm-up over the first tenth, then linear decay to 1%: the factor on the learning rate."""
    if progress < warm:
        return max(progress / warm, 0.01)
    return max(1.0 - (progress - warm) / (1 - warm), 0.01)


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable) -> float:
    """Share of images whose largest logit is the label's, of batches (images [B, C, H, W] in [0, 1], labels [B])."""
    was_training = model.training
    model.eval()
    correct = seen = 0
    for images, labels in batches:
        correct += int((model(images).argmax(1) == labels).sum())
        seen += len(labels)
    model.train(was_training)
    return correct / max(seen, 1)

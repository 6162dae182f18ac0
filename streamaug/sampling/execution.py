"""The execution plan: whether the network is compiled and captured. Decided once, by the trainer; producers obey.

Images are bit-identical only under the same plan, so a measured decision is kept in the cache: a run that is resumed
gets the same one.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from streamaug.config import Config
from streamaug.errors import ConfigError
from streamaug.outputs import write_whole
from streamaug.sampling.memory import Enough
from streamaug.sampling.network import COMPILE_SECONDS, compiler, require_compiler

_log = logging.getLogger("streamaug")

_COMPILED_SPEEDUP = 1.3  # of a batch of 64 on a CPU; small batches gain more


@dataclass(frozen=True)
class Execution:
    """compile: torch.compile the network; graph: capture its evaluations as CUDA graphs."""

    compile: bool = False
    graph: bool = False

    def asdict(self) -> dict[str, Any]:
        return asdict(self)


def check_execution(config: Config, device: torch.device) -> None:
    """Raises ConfigError when what is asked for cannot be had."""
    if config.model.attention_cache > 1 and True in (config.model.compile, config.model.graph):
        raise ConfigError(
            "model.attention_cache changes what an evaluation computes from one to the next, so the network can "
            "neither be compiled nor captured: leave model.compile and model.graph at auto, or set it to 1"
        )
    if config.model.compile is True:
        require_compiler()
    if config.model.graph is True and device.type != "cuda":
        raise ConfigError(
            f"model.graph is true, but the model runs on {device}: CUDA graphs need a GPU; "
            "set model.graph to auto or false"
        )


def decide(
    config: Config, device: torch.device, model_digest: str, evaluation_seconds: Callable[[], float]
) -> Execution:
    """What `model.compile` and `model.graph` come to on this machine.

    evaluation_seconds: measures one uncompiled evaluation of a whole batch; called only when the answer hangs on it.
    Raises ConfigError as `check_execution` does.
    """
    check_execution(config, device)
    graph = config.model.graph
    if config.model.attention_cache > 1:
        return Execution()
    return Execution(
        compile=_compile(config, device, model_digest, evaluation_seconds),
        graph=device.type == "cuda" if graph == "auto" else graph,
    )


def repays(evaluations: float, evaluation_seconds: float, shapes: int) -> bool:
    """Whether compiling saves more than it takes.

    evaluations: of a whole batch, in the whole run; evaluation_seconds: of one, uncompiled; shapes: to be compiled.
    """
    saved = evaluations * evaluation_seconds * (1 - 1 / _COMPILED_SPEEDUP)
    return saved > shapes * COMPILE_SECONDS


def evaluations_of(config: Config) -> float:
    """How many evaluations of a whole batch the configured run comes to, rejected images left out."""
    images = config.loader.peak_ratio * config.train.batch_size * config.train.steps
    weights = [recipe.weight for recipe in config.recipes]
    depth = sum(recipe.weight * sum(recipe.depth) / 2 for recipe in config.recipes) / sum(weights)
    return images / config.stream.batch_size * depth * config.model.steps


def shapes_of(config: Config) -> int:
    """How many batch shapes the network sees: with the unconditional half, and without."""
    guided = [recipe.guidance[1] > 1 for recipe in config.recipes if recipe.weight > 0]
    both = any(guided) and (not all(guided) or config.model.guidance_interval != (0.0, 1.0))
    return 1 + both


def _compile(config: Config, device: torch.device, model_digest: str, evaluation_seconds: Callable[[], float]) -> bool:
    if config.model.compile != "auto":
        return config.model.compile
    if compiler() is None or evaluations_of(config) == 0:
        return False
    kept = _kept_at(config, device, model_digest)
    if kept.is_file():
        return json.loads(kept.read_text())["compile"]
    seconds = evaluation_seconds()
    chosen = repays(evaluations_of(config), seconds, shapes_of(config))
    _log.info(
        "%s: %.0f evaluations of %.0f ms",
        "compiling the network pays" if chosen else "the network runs uncompiled, which is as fast for so few images",
        evaluations_of(config),
        1e3 * seconds,
    )
    write_whole(kept, json.dumps({"compile": chosen, "evaluation_seconds": seconds}).encode())
    return chosen


def _kept_at(config: Config, device: torch.device, model_digest: str) -> Path:
    """Where the measured decision is kept: by all that it was made from."""
    stream = config.stream.model_copy(update={"manifest": None})  # where the run is recorded decides nothing
    sections = config.model_copy(update={"stream": stream}).digest("model", "recipes", "stream", "loader", "train")
    made_from = json.dumps([model_digest, sections, torch.__version__, str(device)])
    return config.cache / f"execution-{hashlib.sha256(made_from.encode()).hexdigest()[:16]}.json"


def measure(sample: Callable[[Callable[[], None]], object], device: torch.device) -> float:
    """Seconds of one evaluation, the second, or the first alone if that takes longer than ten seconds.

    sample: calls what it is given before each evaluation, and returns after the last.
    """
    times: list[float] = []

    def before_evaluation() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter())
        if len(times) > 2 or (len(times) == 2 and times[1] - times[0] > 10):
            raise Enough

    try:
        sample(before_evaluation)
        before_evaluation()
    except Enough:
        pass
    return times[-1] - times[-2]

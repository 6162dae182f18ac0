"""From a configuration to everything a stream needs: data, generator, bank, judge and planner, reused when current."""

import hashlib
import logging
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from streamaug.bank import LatentBank
from streamaug.config import Config
from streamaug.data import ImageSet, Splits, load_splits
from streamaug.engine import build, resolve_device, solver_settings
from streamaug.errors import ConfigError, MismatchError, ModelError
from streamaug.filtering.calibration import build_judge, calibrate, fit_judge, fit_probe
from streamaug.filtering.features import Features, Probed
from streamaug.filtering.judge import Judge, pack_state
from streamaug.inversion.encode import invert
from streamaug.orders import Planner
from streamaug.prior import prior_digest, train_prior
from streamaug.sampling import cascade
from streamaug.sampling.conditioning import encode_prompts
from streamaug.sampling.denoisers import FAMILIES, LoadSettings, ModelInfo, inspect, load
from streamaug.sampling.execution import Execution, check_execution, decide, measure
from streamaug.sampling.solvers.table import schedule_of, solver_for
from streamaug.training.classifiers import build_classifier

log = logging.getLogger("streamaug")

ENGINE = "streamaug.engine:build"


class Progress(Protocol):
    """Where progress goes: `demo.view` has a live and a plain one."""

    def phase(self, name: str, total: int | None = None) -> None: ...

    def advance(self, n: int = 1) -> None: ...


class Silent:
    def phase(self, name: str, total: int | None = None) -> None:
        pass

    def advance(self, n: int = 1) -> None:
        pass


@dataclass(frozen=True)
class Prepared:
    """What `Stream` is built from. `labelled` are the images in the bank, row for row; judge is None when off."""

    config: Config
    splits: Splits
    labelled: ImageSet
    model: ModelInfo
    bank: LatentBank
    judge: Judge | None
    planner: Planner
    prompts: Path | None = None  # the encoded prompts, for families that take them
    features: Features | None = None  # what a judge with `judge.features` is fitted on

    engine = ENGINE

    @cached_property
    def execution(self) -> Execution:
        """How every producer runs the network: decided once, when a stream first asks."""
        return _execution(self)

    @property
    def engine_options(self) -> dict[str, Any]:
        return self.options_for(self.execution)

    def options_for(self, execution: Execution) -> dict[str, Any]:
        """What `engine.build` needs, as plain data."""
        return {
            "config": self.config.model_dump(mode="json"),
            "model": str(self.model.path),
            "bank": str(self.bank.path),
            "num_classes": len(self.class_names),
            "prompts": None if self.prompts is None else str(self.prompts),
            "execution": execution.asdict(),
        }

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.model.image_shape

    @property
    def class_names(self) -> list[str]:
        return self.bank.class_names

    @property
    def judge_state(self) -> np.ndarray | None:
        return None if self.judge is None else pack_state(self.judge)

    @property
    def plan_extra(self) -> dict[str, Any]:
        """What images depend on besides the plan: a state saved under another value is refused."""
        return {
            "model": self.model.digest,
            "bank": self.bank.digest,
            "sampling": self.config.digest("model", "judge"),
            "prompts": None if self.prompts is None else self.prompts.stem,  # named by the hash of what they came from
            "execution": self.execution.asdict(),
        }


def prepare(
    config: Config,
    *,
    progress: Progress | None = None,
    labelled: ImageSet | None = None,
    fresh: bool = False,
    with_judge: bool = True,
) -> Prepared:
    """Load the data, find or train the generator, invert the labelled images, fit the judge.

    labelled: the images to invert; by default `data.shots` per class of the training split, drawn by `seed`. fresh:
    train the prior again even if the cache has it. with_judge=False leaves the judge's weights to the caller.
    """
    progress = progress or Silent()
    progress.phase("loading images")
    splits = load_splits(config.data)
    for note in splits.notes:
        log.warning("%s", note)
    _check_names(config, len(splits.train.class_names))
    if labelled is None:
        labelled = splits.train.subset(splits.train.select_shots(config.data.shots, config.seed))
    model = find_model(config, splits, progress=progress, fresh=fresh)
    check_model(config, model, labelled)
    if model.upscaler is not None:
        cascade.check(model.upscaler, config.model.upscaler_steps, config.model.upscaler_noise_level)
    scheduler, options, when = solver_settings(config, model)
    solver_for(scheduler, config.model.steps, options=options, timing=when)
    prompts = _prompts(config, model, labelled, progress)
    bank = _bank(config, model, labelled, progress)
    judge, features = None, None
    if config.judge.enabled:
        progress.phase("fitting the judge")
        features = judge_features(config, model)
        if with_judge:
            judge = make_judge(config, labelled, config.seed, features)
        else:
            judge = build_judge(config, len(bank.class_names), features)
    planner = Planner(
        bank.labels,
        len(bank.class_names),
        schedule_of(scheduler, config.model.steps, options=options, timing=when),
        config.recipes,
        config.stream.batch_size,
        config.seed,
        templates=len(config.model.prompts) if prompts is not None else 1,
    )
    return Prepared(config, splits, labelled, model, bank, judge, planner, prompts, features)


def find_model(config: Config, splits: Splits, *, progress: Progress, fresh: bool = False) -> ModelInfo:
    """The configured model, or the cached prior of these images, trained now when there is none."""
    if config.model.path is not None:
        return inspect(config.model.path, config.data.image_size, config.model.variant, config.model.upscaler)
    assert config.prior is not None
    images = splits.unlabelled
    path = config.cache / f"prior-{prior_digest(images, config.prior)}"
    if fresh or not (path / "model_index.json").is_file():
        _writable(config.cache)
        progress.phase("training the prior", config.prior.steps)
        train_prior(images, config.prior, path, progress=lambda done, total: progress.advance())
    return inspect(path)


def _check_names(config: Config, num_classes: int) -> None:
    """Refuse a device or a classifier that is not there before anything is trained."""
    check_execution(config, resolve_device(config.model.device))
    data = config.data
    for name in {config.train.classifier, config.judge.classifier}:
        build_classifier(name, channels=data.channels, image_size=data.image_size, num_classes=num_classes)


def check_model(config: Config, model: ModelInfo, labelled: ImageSet) -> None:
    """Refuse a model that does not fit the images or the recipes."""
    if model.image_shape != labelled.image_shape:
        channels, size, _ = model.image_shape
        raise MismatchError(
            f"{model.path} makes images of {_shape(model.image_shape)}, the data are {_shape(labelled.image_shape)}: "
            f"set data.channels to {channels} and data.image_size to {size}"
        )
    classes = len(labelled.class_names)
    if 0 < model.num_classes < classes:
        raise MismatchError(
            f"{model.path} knows {model.num_classes} classes, the data have {classes}: set model.path to a model "
            "of at least as many, or data.root to a folder of at most as many"
        )
    null_class = model.null_class if config.model.null_class is None else config.model.null_class
    if null_class is not None and not 0 <= null_class < model.num_classes:
        raise MismatchError(f"model.null_class is {null_class}, the model has classes 0 to {model.num_classes - 1}")
    if null_class is not None and null_class < classes:
        raise MismatchError(
            f"the class {null_class} of {model.path} means 'no class' and is one of the data's {classes} classes: set "
            f"data.root to a folder of at most {null_class}, or model.null_class to the class that means none"
        )
    has_null = model.guidance == "cfg" and (model.conditioning == "prompt" or null_class is not None)
    for position, recipe in enumerate(config.recipes):
        where = f"recipes.{position}"
        by_label = model.conditioning != "none" or recipe.classifier_guidance[0] > 0
        if recipe.kind == "generate" and not by_label:
            raise ConfigError(
                f"{where}: 'generate' needs a class-conditional model or classifier_guidance above 0; "
                "this model does not know labels, use 'noise' or 'interpolate'"
            )
        if recipe.guidance != (1.0, 1.0) and model.guidance != "embedded" and not has_null:
            missing = "null class: set model.null_class"
            if model.guidance == "none":
                prompted = model.conditioning == "prompt"
                missing = "model that was not distilled to run without it" if prompted else "class-conditional model"
            raise ConfigError(f"{where}.guidance: classifier-free guidance needs a {missing}; or set it to [1, 1]")
        if recipe.classifier_guidance[1] > 0 and not config.judge.enabled:
            raise ConfigError(f"{where}.classifier_guidance needs the judge: set judge.enabled to true")


def judge_features(config: Config, model: ModelInfo) -> Features | None:
    """The denoiser's features, when `judge.features` asks for them. Raises ConfigError for a family without."""
    if not config.judge.features:
        return None
    if not hasattr(FAMILIES[model.family], "FEATURES"):
        having = [name for name, family in FAMILIES.items() if hasattr(family, "FEATURES")]
        raise ConfigError(f"judge.features: {model.family} gives none; accepted are models of: {', '.join(having)}")
    settings = LoadSettings(resolve_device(config.model.device), variant=config.model.variant)
    return Features(load(model, settings), config.judge.feature_timestep)


def make_judge(config: Config, labelled: ImageSet, seed: int, features: Features | None = None) -> Judge:
    """The judge with the user's weights, or fitted on the labelled images."""
    if config.judge.weights is None:
        return fit_judge(config, labelled, seed, features)
    judge = build_judge(config, len(labelled.class_names), features)
    pixels = Probed.pixels(judge.classifier)
    path = config.judge.weights
    try:
        pixels.load_state_dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise ModelError(f"judge.weights {path}: cannot be read as safetensors: {error}") from None
    except RuntimeError as error:
        raise ModelError(f"judge.weights {path}: do not fit classifier '{config.judge.classifier}': {error}") from None
    broken = [name for name, value in judge.state_dict().items() if not torch.isfinite(value.float()).all()]
    if broken:
        raise ModelError(f"judge.weights {path}: NaN or infinity in {', '.join(broken)}")
    fit_probe(config, judge, labelled, seed)
    calibrate(judge, labelled, config)
    return judge


def _bank(config: Config, model: ModelInfo, labelled: ImageSet, progress: Progress) -> LatentBank:
    """Write the bank (resumably; nothing is computed when it is complete) and open it."""
    path = config.bank.path
    if path is None:
        content = hashlib.sha256("".join([model.digest, config.digest("bank"), *labelled.hashes]).encode())
        path = config.cache / f"bank-{content.hexdigest()[:16]}"
        if not path.exists():
            _writable(config.cache)
    progress.phase("inverting", len(labelled))
    seen = 0

    def advance(done: int, total: int) -> None:
        nonlocal seen
        progress.advance(done - seen)
        seen = done

    encode = None
    if not model.pixels:
        encode = FAMILIES[model.family].encoder(model, resolve_device(config.model.device), config.model.variant)
    return invert(labelled, path, config=config.bank, model_digest=model.digest, encode=encode, progress=advance)


def _prompts(config: Config, model: ModelInfo, labelled: ImageSet, progress: Progress) -> Path | None:
    if model.conditioning != "prompt":
        return None
    progress.phase("encoding prompts")
    _writable(config.cache)
    return encode_prompts(
        model,
        labelled.class_names,
        config.model.prompts,
        config.cache,
        negative=config.model.negative_prompt,
        class_tokens=config.model.class_tokens,
        variant=config.model.variant,
        device=resolve_device(config.model.device),
    )


def _execution(prepared: Prepared) -> Execution:
    """How the network is run, measured on the first batch where it hangs on that."""
    config = prepared.config
    device = resolve_device(config.model.device)

    def evaluation_seconds() -> float:
        _writable(config.cache)
        engine, order = build(prepared.options_for(Execution())), prepared.planner.batch(0, prepared.planner.uniform())
        return measure(lambda beat: engine.look(order, beat), device)

    return decide(config, device, prepared.model.digest, evaluation_seconds)


def _writable(cache: Path) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache).close()
    except OSError as error:
        raise ConfigError(
            f"the cache folder {cache} cannot be written ({error.strerror}); "
            "set `cache` or STREAMAUG_CACHE to one that can"
        ) from None


def _shape(shape: tuple[int, int, int]) -> str:
    return f"{shape[0]} channel{'s' if shape[0] > 1 else ''}, {shape[1]}x{shape[2]} pixels"

"""From a configuration to everything a stream needs: data, generator, bank, judge and planner, reused when current."""

import fcntl
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from streamaug.bank import LatentBank
from streamaug.bank.neighbours import nearest_rows
from streamaug.config import Config
from streamaug.data import ImageSet, Splits, load_splits
from streamaug.engine import build, resolve_device, solver_settings
from streamaug.filtering.calibration import build_judge
from streamaug.filtering.configured import judge_features, make_judge
from streamaug.filtering.features import Features
from streamaug.filtering.judge import Judge, pack_state
from streamaug.fits import check_model, check_recipes, check_without_images
from streamaug.generator import check_writable, find_model, find_prompts
from streamaug.inverting import find_bank
from streamaug.orders import Planner, Schedule
from streamaug.progress import Logged, Progress, Silent
from streamaug.sampling import cascade
from streamaug.sampling.conditioning import wordings
from streamaug.sampling.denoisers import ModelInfo
from streamaug.sampling.denoisers.autoencoder import digest_of_tiny
from streamaug.sampling.execution import Execution, check_execution, decide, measure
from streamaug.sampling.residence import Residence
from streamaug.sampling.residence import decide as decide_residence
from streamaug.sampling.solvers.table import schedule_of, solver_for
from streamaug.training.classifiers import build_classifier

log = logging.getLogger("streamaug")

ENGINE = "streamaug.engine:build"


@dataclass(frozen=True)
class Prepared:
    """What `Stream` is built from.

    labelled: the images that were inverted, in the order of the bank's rows unless rows were dropped or merged; judge:
    None when off.
    """

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

    @cached_property
    def residence(self) -> Residence:
        """Where every producer keeps the bank: decided once, as `execution` is."""
        recipes = [recipe for recipe in self.config.recipes if recipe.weight > 0]
        names: list[str] = [recipe.rows for recipe in recipes if recipe.rows]
        if any(recipe.by_embedding for recipe in recipes):
            names += self.bank.tensors_of("embedding")
        return decide_residence(self.config.bank.device, self.bank, names, resolve_device(self.config.model.device))

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
            "class_ids": self.model.class_ids,
            "prompts": None if self.prompts is None else str(self.prompts),
            "execution": execution.asdict(),
            "residence": self.residence,
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
        tiny_vae = self.config.model.tiny_vae
        return {
            "model": self.model.digest,
            "tiny_vae": None if tiny_vae is None else digest_of_tiny(tiny_vae),
            "class_ids": self.model.class_ids,
            "bank": self.bank.digest,
            "sampling": self.config.digest("model", "judge"),
            "prompts": None if self.prompts is None else self.prompts.stem,  # named by the hash of what they came from
            "execution": self.execution.asdict(),
            "residence": self.residence,
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
    check_recipes(config, splits.train.class_names)
    if labelled is None:
        labelled = splits.train.subset(splits.train.select_shots(config.data.shots, config.seed))
    if len(labelled) == 0:
        check_without_images(config)
    model = find_model(config, splits.unlabelled, labelled, progress=progress, fresh=fresh)
    check_model(config, model, labelled)
    if model.upscaler is not None:
        cascade.check(model.upscaler, config.model.upscaler_steps, config.model.upscaler_noise_level)
    scheduler, options, when = solver_settings(config, model)
    solver_for(scheduler, config.model.steps, options=options, timing=when)
    prompts = find_prompts(config, model, labelled, progress)
    judge, features = None, None
    if config.judge.enabled:
        progress.phase("fitting the judge")
        features = judge_features(config, model)
        if with_judge or config.bank.score:
            judge = make_judge(config, labelled, config.seed, features)
        else:
            judge = build_judge(config, len(labelled.class_names), features)
    bank = find_bank(config, model, labelled, prompts, judge, progress)
    schedule = schedule_of(scheduler, config.model.steps, options=options, timing=when)
    planner = _planner(config, bank, schedule, prompted=prompts is not None)
    return Prepared(config, splits, labelled, model, bank, judge, planner, prompts, features)


def prepare_in_turn(config: Config) -> Prepared:
    """`prepare`, one process at a time for one configuration and cache: the first makes what the others then find.

    For scripts: what takes long is said in the log.
    """
    with _turn(config):
        return prepare(config, progress=Logged(f" (once: it is kept in {config.cache})"))


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Within it global generators may be drawn from; after it they are as before, so that the one changed line of a
    script gives its model no other initial weights."""
    plain, numpys = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if torch.cuda.is_initialized() and device.type == "cuda" else []):
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(numpys)


@contextmanager
def _turn(config: Config) -> Iterator[None]:
    name = config.digest("seed", "data", "model", "prior", "bank", "judge", "recipes")
    try:
        config.cache.mkdir(parents=True, exist_ok=True)
        file = open(config.cache / f".preparing-{name}", "ab")  # noqa: SIM115
    except OSError:  # a cache that cannot be written may still have everything
        yield
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process prepares the same: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _planner(config: Config, bank: LatentBank, schedule: Schedule, *, prompted: bool) -> Planner:
    pairing = [recipe for recipe in config.recipes if recipe.kind in ("interpolate", "embedding") and recipe.weight > 0]
    near = max((recipe.neighbours for recipe in pairing if recipe.pairs == "nearest"), default=0)
    paired = {name for recipe in pairing if recipe.pairs != "mixed" for name in recipe.classes or bank.class_names}
    counts = np.bincount(bank.labels, minlength=len(bank.class_names))
    alone = [name for name, n in zip(bank.class_names, counts, strict=True) if n == 1 and name in paired]
    if alone:
        log.warning("classes with one image have no partner and are varied by noise alone: %s", ", ".join(alone)[:500])
    return Planner(
        bank.labels,
        len(bank.class_names),
        schedule,
        config.recipes,
        config.stream.batch_size,
        config.seed,
        templates=len(wordings(config.model.prompts, bank.class_names)[0]) if prompted else 1,
        class_names=bank.class_names,
        inverted_start=schedule.start_of(config.bank.ddim.depth),
        neighbours=nearest_rows(bank, near, config.cache) if near else None,
    )


def _check_names(config: Config, num_classes: int) -> None:
    """Refuse a device or a classifier that is not there before anything is trained."""
    check_execution(config, resolve_device(config.model.device))
    data = config.data
    for name in {config.train.classifier, config.judge.classifier}:
        build_classifier(name, channels=data.channels, image_size=data.image_size, num_classes=num_classes)


def _execution(prepared: Prepared) -> Execution:
    """How the network is run, measured on the first batch where it hangs on that."""
    config = prepared.config
    device = resolve_device(config.model.device)

    def evaluation_seconds() -> float:
        check_writable(config.cache)
        engine, order = build(prepared.options_for(Execution())), prepared.planner.batch(0, prepared.planner.uniform())
        return measure(lambda beat: engine.look(order, beat), device)

    return decide(config, device, prepared.model.digest, evaluation_seconds)

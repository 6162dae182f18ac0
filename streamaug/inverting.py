"""Real images to a latent bank, by configuration: what `streamaug invert`, `sa.invert` and `prepare` do."""

import hashlib
import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamaug.bank import LatentBank
from streamaug.bank.edit import SCORE
from streamaug.bank.files import read_index
from streamaug.config import Config, load
from streamaug.data import ImageSet, as_image_set, load_splits
from streamaug.engine import solver_settings
from streamaug.errors import BankError, MismatchError
from streamaug.filtering.configured import judge_features, make_judge
from streamaug.filtering.judge import Judge
from streamaug.fits import check_model, check_recipes, check_without_images
from streamaug.generator import check_writable, find_model, find_prompts
from streamaug.inversion import run
from streamaug.inversion.method import Method
from streamaug.inversion.methods import methods_for
from streamaug.outputs import plain
from streamaug.progress import Progress, Silent
from streamaug.sampling.denoisers import ModelInfo

log = logging.getLogger("streamaug")


def invert(dataset: Any, config: Config | str | os.PathLike, *, path: str | os.PathLike | None = None) -> LatentBank:
    """The bank of a data set of your own, written to `path` (default: bank.path, or the cache), or opened if current.

    dataset: anything with a length that yields (image, label): a torch or torchvision Dataset, a list, a Hugging Face
    Dataset, an ImageSet, or the path of a folder per class. Its images are fitted to data.image_size and
    data.channels. config: as for `load`. Without a model.path the prior is trained on these images.
    """
    config = config if isinstance(config, Config) else load(config)
    if path is not None:
        config = config.model_copy(update={"bank": config.bank.model_copy(update={"path": Path(path)})})
    images = as_image_set(dataset, config.data)
    return _write(_Job.of(config, images, images, Silent()), Silent())


def invert_configured(config: Config, *, progress: Progress) -> LatentBank:
    """The bank of the configuration's labelled images."""
    return _write(_job(config, progress), progress)


def estimate_configured(config: Config, *, progress: Progress) -> run.Estimate:
    """What inverting the configuration's labelled images takes, measured on one group; no bank is written."""
    job = _job(config, progress)
    progress.phase("measuring one group")
    methods = methods_for(config, job.model, job.prompts, job.judge)
    path = bank_path(config, job.model, job.images, methods)
    job.say_what_was_skipped()
    return run.estimate(
        job.images,
        path,
        methods,
        model_digest=job.model.digest,
        shard_rows=config.bank.shard_rows,
        fit=config.data.fit,
        others=_other_banks(config, path),
    )


def write_bank(
    config: Config,
    model: ModelInfo,
    images: ImageSet,
    prompts: Path | None,
    judge: Judge | None,
    progress: Progress,
) -> LatentBank:
    """Write the bank (resumably; nothing is computed when it is complete) and open it.

    judge: what bank.score has the rows scored by.
    """
    methods = methods_for(config, model, prompts, judge)
    path = bank_path(config, model, images, methods)
    return run.invert(
        images,
        path,
        methods,
        model_digest=model.digest,
        shard_rows=config.bank.shard_rows,
        fit=config.data.fit,
        others=_other_banks(config, path),
        progress=_Reporter(progress),
    )


class _Reporter:
    """Reports each method as a phase of its own, of the rows that are still to be done: methods differ in speed."""

    def __init__(self, progress: Progress):
        self._progress = progress
        self._method: str | None = None
        self._first = self._done = 0  # rows that were there before, rows that are there now
        self._began = 0.0

    def __call__(self, method: str, done: int, total: int) -> None:
        if method != self._method:
            self._method, self._first, self._done, self._began = method, done, done, time.monotonic()
            there = f", {done:,} rows are there already" if done else ""
            self._progress.phase(f"inverting ({method}{there})", total - done)
            return
        rate = (done - self._first) / max(time.monotonic() - self._began, 1e-9)
        # Taken off at the end, so that no later phase shows it.
        self._progress.advance(done - self._done, images_per_s=None if done == total else rate)
        self._done = done


def find_bank(
    config: Config,
    model: ModelInfo,
    images: ImageSet,
    prompts: Path | None,
    judge: Judge | None,
    progress: Progress,
) -> LatentBank:
    """The bank for training: written if need be, and used as it is where its rows were dropped or merged.

    Raises MismatchError when such a bank is of another model, of other methods or settings, or of other classes.
    """
    methods = methods_for(config, model, prompts, judge)
    path = bank_path(config, model, images, methods)
    if _edited(path):
        bank = LatentBank.open(path)
        _check_edited(bank, images, methods)
        log.info("%s is used as it is (%s); `streamaug invert` makes it whole again", path, "; ".join(bank.edits))
        return bank
    return write_bank(config, model, images, prompts, judge, progress)


def _edited(path: Path) -> bool:
    """Whether a bank is there whose rows were dropped or merged; what cannot be read is written anew."""
    try:
        return bool(read_index(path)["edits"])
    except BankError:
        return False


def _check_edited(bank: LatentBank, images: ImageSet, methods: Sequence[Method]) -> None:
    remedy = "run `streamaug invert` to make it anew, or set bank.path to another folder"
    wanted = {method.part.name: plain(method.part.meta) for method in methods}
    for name, meta in wanted.items():
        if name not in bank.parts:
            raise MismatchError(f"{bank.path}: the bank has no part '{name}', which bank.methods names; {remedy}")
        there = plain(bank.parts[name])
        unlike = sorted(key for key in {*there, *meta} if there.get(key) != meta.get(key))
        if unlike:
            made, asked = ({key: each.get(key) for key in unlike} for each in (there, meta))
            raise MismatchError(
                f"{bank.path}: '{name}' was made with {made}, the configuration asks for {asked}; {remedy}"
            )
    if bank.class_names != images.class_names:
        raise MismatchError(
            f"{bank.path}: the bank's classes are {', '.join(bank.class_names)[:300]}, the data's are "
            f"{', '.join(images.class_names)[:300]}; {remedy}"
        )


def bank_path(config: Config, model: ModelInfo, images: ImageSet, methods: Sequence[Method]) -> Path:
    """bank.path, or a folder in the cache that is named by what the bank is made from.

    Other settings of sampling that its rows depend on, such as model.steps, lead to another folder: trying them does
    not cost the bank that is there.
    """
    if config.bank.path is not None:
        return config.bank.path
    # What decides no byte of the bank does not send it elsewhere, to be computed again.
    settings = config.bank.model_dump(mode="json", exclude={"device": True, "embedding": {"checkpoint_every"}})
    made_by = [plain(method.part.meta) for method in methods if method.part.name != SCORE]
    described = json.dumps([settings, made_by], sort_keys=True)
    content = hashlib.sha256("".join([model.digest, described, *images.hashes]).encode())
    path = config.cache / f"bank-{content.hexdigest()[:16]}"
    if not path.exists():
        check_writable(config.cache)
    return path


def _other_banks(config: Config, path: Path) -> list[Path]:
    """The cache's other banks, where this one is in the cache: what they hold of it need not be made again."""
    return sorted(set(config.cache.glob("bank-*")) - {path}) if config.bank.path is None else []


@dataclass(frozen=True)
class _Job:
    """What is inverted, and with what."""

    config: Config
    images: ImageSet
    model: ModelInfo
    prompts: Path | None
    judge: Judge | None
    notes: Sequence[str]

    @classmethod
    def of(
        cls,
        config: Config,
        images: ImageSet,
        unlabelled: ImageSet,
        progress: Progress,
        notes: Sequence[str] = (),
    ) -> "_Job":
        check_recipes(config, images.class_names)
        if len(images) == 0:
            check_without_images(config)
        model = find_model(config, unlabelled, images, progress=progress)
        check_model(config, model, images)
        solver_settings(config, model)  # a scheduler that sampling would refuse is refused before hours of inversion
        prompts = find_prompts(config, model, images, progress)
        judge = None
        if config.bank.score:
            progress.phase("fitting the judge")
            judge = make_judge(config, images, config.seed, judge_features(config, model))
        return cls(config, images, model, prompts, judge, notes)

    def say_what_was_skipped(self) -> None:
        """At the end, where it does not scroll away."""
        for note in self.notes:
            log.warning("%s", note)


def _job(config: Config, progress: Progress) -> _Job:
    progress.phase("loading images")
    splits = load_splits(config.data)
    labelled = splits.train.subset(splits.train.select_shots(config.data.shots, config.seed))
    return _Job.of(config, labelled, splits.unlabelled, progress, splits.notes)


def _write(job: _Job, progress: Progress) -> LatentBank:
    bank = write_bank(job.config, job.model, job.images, job.prompts, job.judge, progress)
    job.say_what_was_skipped()
    return bank

"""Real images to a latent bank, by configuration: what `streamaug invert`, `sa.invert` and `prepare` do."""

import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamaug.bank import LatentBank
from streamaug.bank.files import INDEX
from streamaug.config import Config, load
from streamaug.data import ImageSet, as_image_set, load_splits
from streamaug.engine import solver_settings
from streamaug.errors import MismatchError
from streamaug.filtering.configured import judge_features, make_judge
from streamaug.filtering.judge import Judge
from streamaug.fits import check_model, check_recipes
from streamaug.generator import check_writable, find_model, find_prompts
from streamaug.inversion import run
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
    path = bank_path(config, job.model, job.images)
    return run.estimate(job.images, path, methods, model_digest=job.model.digest, shard_rows=config.bank.shard_rows)


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
    seen: int | None = None

    def advance(done: int, total: int) -> None:
        nonlocal seen
        if seen is None:
            progress.phase("inverting", total)
        progress.advance(done - (seen or 0))
        seen = done

    return run.invert(
        images,
        bank_path(config, model, images),
        methods_for(config, model, prompts, judge),
        model_digest=model.digest,
        shard_rows=config.bank.shard_rows,
        fit=config.data.fit,
        progress=advance,
    )


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
    path = config.bank.path
    if path is not None and (path / INDEX).is_file():
        bank = LatentBank.open(path)
        if bank.edits:
            _check_edited(bank, config, model, images, prompts, judge)
            log.info("%s is used as it is (%s); `streamaug invert` makes it whole again", path, "; ".join(bank.edits))
            return bank
    return write_bank(config, model, images, prompts, judge, progress)


def _check_edited(
    bank: LatentBank, config: Config, model: ModelInfo, images: ImageSet, prompts: Path | None, judge: Judge | None
) -> None:
    remedy = "run `streamaug invert` to make it anew, or set bank.path to another folder"
    wanted = {method.part.name: plain(method.part.meta) for method in methods_for(config, model, prompts, judge)}
    for name, meta in wanted.items():
        if name not in bank.parts:
            raise MismatchError(f"{bank.path}: the bank has no part '{name}', which bank.methods names; {remedy}")
        if plain(bank.parts[name]) != meta:
            raise MismatchError(
                f"{bank.path}: '{name}' was made with {bank.parts[name]}, the configuration asks for {meta}; {remedy}"
            )
    if bank.class_names != images.class_names:
        raise MismatchError(
            f"{bank.path}: the bank's classes are {', '.join(bank.class_names)[:300]}, the data's are "
            f"{', '.join(images.class_names)[:300]}; {remedy}"
        )


def bank_path(config: Config, model: ModelInfo, images: ImageSet) -> Path:
    """bank.path, or a folder in the cache that is named by what the bank is made from."""
    if config.bank.path is not None:
        return config.bank.path
    content = hashlib.sha256("".join([model.digest, config.digest("bank"), *images.hashes]).encode())
    path = config.cache / f"bank-{content.hexdigest()[:16]}"
    if not path.exists():
        check_writable(config.cache)
    return path


@dataclass(frozen=True)
class _Job:
    """What is inverted, and with what."""

    config: Config
    images: ImageSet
    model: ModelInfo
    prompts: Path | None
    judge: Judge | None

    @classmethod
    def of(cls, config: Config, images: ImageSet, unlabelled: ImageSet, progress: Progress) -> "_Job":
        check_recipes(config)
        model = find_model(config, unlabelled, images, progress=progress)
        check_model(config, model, images)
        solver_settings(config, model)  # a scheduler that sampling would refuse is refused before hours of inversion
        prompts = find_prompts(config, model, images, progress)
        judge = None
        if config.bank.score:
            progress.phase("fitting the judge")
            judge = make_judge(config, images, config.seed, judge_features(config, model))
        return cls(config, images, model, prompts, judge)


def _job(config: Config, progress: Progress) -> _Job:
    progress.phase("loading images")
    splits = load_splits(config.data)
    for note in splits.notes:
        log.warning("%s", note)
    labelled = splits.train.subset(splits.train.select_shots(config.data.shots, config.seed))
    return _Job.of(config, labelled, splits.unlabelled, progress)


def _write(job: _Job, progress: Progress) -> LatentBank:
    return write_bank(job.config, job.model, job.images, job.prompts, job.judge, progress)

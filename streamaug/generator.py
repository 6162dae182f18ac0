"""The generator: the user's diffusion model, or a prior trained on the images, and its encoded prompts."""

import tempfile
from pathlib import Path
from typing import Literal

import numpy as np

from streamaug.config import Config
from streamaug.data import ImageSet
from streamaug.engine import resolve_device
from streamaug.errors import ConfigError
from streamaug.prior import prior_digest, train_prior
from streamaug.progress import Progress
from streamaug.sampling.conditioning import encode_prompts
from streamaug.sampling.denoisers import ModelInfo, inspect, with_class_ids


def find_model(
    config: Config, unlabelled: ImageSet, labelled: ImageSet, *, progress: Progress, fresh: bool = False
) -> ModelInfo:
    """The configured model, or the cached prior of the `unlabelled` images, trained now when there is none."""
    if config.model.path is not None:
        model = inspect(config.model.path, config.data.image_size, config.model.variant, config.model.upscaler)
        return with_class_ids(model, labelled.class_names)
    assert config.prior is not None
    labels = _known_labels(unlabelled, labelled, config.prior.labels) if config.prior.labels else None
    path = config.cache / f"prior-{prior_digest(unlabelled, config.prior, labels)}"
    if fresh or not (path / "model_index.json").is_file():
        check_writable(config.cache)
        progress.phase("training the prior", config.prior.steps)
        train_prior(
            unlabelled,
            config.prior,
            path,
            labels=labels,
            num_classes=len(labelled.class_names),
            progress=lambda done, total: progress.advance(),
        )
    return inspect(path)


def _known_labels(images: ImageSet, labelled: ImageSet, which: Literal[True, "all"]) -> np.ndarray:
    """The label of each image that is among the labelled ones, or of "all", int64 [N]; -1 for the others."""
    if which == "all":
        return images.labels
    label_of = dict(zip(labelled.hashes, labelled.labels.tolist(), strict=True))
    return np.array([label_of.get(digest, -1) for digest in images.hashes], dtype=np.int64)


def find_prompts(config: Config, model: ModelInfo, labelled: ImageSet, progress: Progress) -> Path | None:
    """The file of the model's encoded prompts, written now when it is not there; None for a model that takes none."""
    if model.conditioning != "prompt":
        return None
    progress.phase("encoding prompts")
    check_writable(config.cache)
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


def check_writable(cache: Path) -> None:
    """Make the cache folder. Raises ConfigError when it cannot be written."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache).close()
    except OSError as error:
        raise ConfigError(
            f"the cache folder {cache} cannot be written ({error.strerror}); "
            "set `cache` or STREAMAUG_CACHE to one that can"
        ) from None

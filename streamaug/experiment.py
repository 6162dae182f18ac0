"""One classifier trained once: on real images alone, or on real images and the stream. `train` and `demo` run this."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, RandomSampler

from streamaug.config import ArmConfig, Config, TrainConfig
from streamaug.data import Batches, ImageDataset, ImageSet
from streamaug.loader import StreamLoader
from streamaug.outputs import write_json
from streamaug.preparation import prepare
from streamaug.stream import Stream
from streamaug.training.classifiers import build_classifier
from streamaug.training.trainer import TrainResult, forever, train

OnStep = Callable[[int, float | None], None]


def real_batches(labelled: ImageSet, config: TrainConfig, seed: int, *, soft: bool = False) -> DataLoader:
    """The DataLoader a user would have: one epoch is the whole run, images drawn with replacement.

    soft: labels as probabilities [B, C], which recipes that mix classes need.
    """
    random = torch.Generator().manual_seed(seed)
    dataset = ImageDataset(labelled, soft=soft)
    sampler = RandomSampler(dataset, replacement=True, num_samples=config.steps * config.batch_size, generator=random)
    return DataLoader(dataset, batch_size=config.batch_size, sampler=sampler)


def for_arm(config: TrainConfig, arm: ArmConfig) -> TrainConfig:
    """The training settings with what an arm sets for itself."""
    return config.model_copy(update=arm.model_dump(exclude_none=True))


def run_arm(
    config: Config,
    settings: TrainConfig,
    labelled: ImageSet,
    test: ImageSet,
    *,
    seed: int,
    stream: Stream | None = None,
    eval_every: int | None = None,
    on_step: OnStep | None = None,
    deadline_seconds: float | None = None,
) -> TrainResult:
    """Train one classifier from scratch on the labelled images, mixed with the stream if one is given.

    Both arms of a comparison start from the same weights and draw real images and augmentation from the same seeds.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_classifier(
            settings.classifier,
            channels=config.data.channels,
            image_size=config.data.image_size,
            num_classes=len(labelled.class_names),
        )
        mixes = any(recipe.pairs == "mixed" for recipe in config.recipes)
        loader: Any = real_batches(labelled, settings, seed, soft=mixes)
        if stream is not None:
            loader = StreamLoader(
                loader,
                stream,
                ratio=config.loader.ratio,
                mode=config.loader.mode,
                displaced=config.loader.displaced,
                seed=seed,
            )
        return train(
            model,
            forever(loader),
            settings,
            seed=seed,
            test=Batches(test),
            eval_every=eval_every,
            on_step=on_step,
            deadline_seconds=deadline_seconds,
        )


def train_run(config: Config, *, out: Path, view: Any, real_only: bool = False) -> dict[str, Any]:
    """`streamaug train`: one run on the configured data, its figures written to out/report.json."""
    began = time.monotonic()
    prepared = prepare(config, progress=view)
    settings = for_arm(config.train, config.demo.real_only) if real_only else config.train
    test = prepared.splits.test
    view.phase("training", settings.steps)
    report: dict[str, Any] = {}

    def arm(stream: Stream | None) -> TrainResult:
        def on_step(step: int, accuracy: float | None) -> None:
            figures = {"stream_accuracy" if stream else "real_only_accuracy": accuracy} if accuracy is not None else {}
            view.advance(1, **figures)

        every = max(settings.steps // 10, 1)
        return run_arm(
            config,
            settings,
            prepared.labelled,
            test,
            seed=config.seed,
            stream=stream,
            eval_every=every,
            on_step=on_step,
        )

    if real_only:
        result = arm(None)
    else:
        with Stream.from_prepared(prepared) as stream:
            result = arm(stream)
            report |= stream.stats().as_dict()
    arm_report = {
        "accuracy": result.accuracy,
        "steps": result.steps,
        "seconds": round(result.seconds, 3),
        "curve": result.curve,
    }
    report |= {
        "real_only" if real_only else "stream": arm_report,
        "accuracy": result.accuracy,
        "test_images": len(test),
        "seconds_total": round(time.monotonic() - began, 3),
        "notes": prepared.splits.notes,
        "config": config.model_dump(mode="json"),
    }
    write_json(report, out / "report.json")
    return report

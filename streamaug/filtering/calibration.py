"""Fit the judge's classifier on the labelled images and set its thresholds per class from real images."""

import numpy as np
import torch

from streamaug.config import Config
from streamaug.data import Batches, ImageSet, pixels
from streamaug.filtering.features import Features, Probed
from streamaug.filtering.judge import Judge
from streamaug.training.classifiers import build_classifier
from streamaug.training.trainer import train

FEW_IMAGES = 10  # below this many images a class, quantiles mean nothing and the fixed rule is used


def build_judge(config: Config, num_classes: int, features: Features | None = None) -> Judge:
    """The judge's architecture with random weights and the fixed rule's thresholds.

    features: the denoiser's, when `judge.features` asks for a probe on them.
    """
    classifier = build_classifier(
        config.judge.classifier,
        channels=config.data.channels,
        image_size=config.data.image_size,
        num_classes=num_classes,
    )
    if features is not None:
        classifier = Probed(classifier, features, num_classes)
    return Judge(classifier, num_classes, config.judge).eval()


def fit_judge(config: Config, labelled: ImageSet, seed: int, features: Features | None = None) -> Judge:
    """Train the judge on labelled images and calibrate it: same arguments, same judge, bit for bit."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = build_judge(config, len(labelled.class_names), features)
        pixels = Probed.pixels(judge.classifier)
        settings = config.train.model_copy(update={"steps": config.judge.steps, "lr": config.judge.lr})
        train(pixels, _batches(labelled, settings.batch_size, seed), settings, seed=seed)
        fit_probe(config, judge, labelled, seed)
    calibrate(judge.eval(), labelled, config)
    return judge


def fit_probe(config: Config, judge: Judge, labelled: ImageSet, seed: int) -> None:
    """Fit the probe on the denoiser's features, if the judge has one."""
    if isinstance(judge.classifier, Probed):
        judge.classifier.fit_probe(labelled, config.train.augment, seed)


def calibrate(judge: Judge, labelled: ImageSet, config: Config) -> None:
    """Per-class thresholds: at most `quantile` of a class's real images would be rejected by either.

    With the fixed rule, or fewer than FEW_IMAGES images of a class under "auto", the configured constants stay.
    """
    rule = config.judge.rule
    counts = np.bincount(labelled.labels, minlength=len(labelled.class_names))
    if rule == "fixed" or (rule == "auto" and counts.min() < FEW_IMAGES):
        return
    labels = torch.from_numpy(labelled.labels)
    with torch.no_grad():
        logits = torch.cat([judge(images * 2 - 1) for images, _ in Batches(labelled)])
    probability = torch.softmax(logits, dim=1)
    own = probability.gather(1, labels[:, None])[:, 0]
    for label in range(len(counts)):
        judge.floor[label] = torch.quantile(own[labels == label], config.judge.quantile).clamp(max=config.judge.floor)
        # How sure the judge is of this class on images of the others: beyond that it is trusted.
        elsewhere = probability[labels != label, label]
        threshold = torch.quantile(elsewhere, 1 - config.judge.quantile)
        judge.confident[label] = threshold.clamp(min=0.5, max=config.judge.confident)


def _batches(labelled: ImageSet, batch_size: int, seed: int):
    """Endless random batches (images [B, C, H, W] in [0, 1], labels) drawn with replacement."""
    labels = torch.from_numpy(labelled.labels)
    random = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(len(labels), (batch_size,), generator=random)
        yield pixels(labelled, chosen.numpy()), labels[chosen]

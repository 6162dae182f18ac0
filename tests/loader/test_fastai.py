"""The recipe of docs/frameworks.md, where fastai is installed: it is in no extra, as it brings spaCy and 36 others."""

import numpy as np
import pytest
import torch
from PIL import Image

import streamaug as sa

from .fakes import FakeStream

CLASSES = ["ant", "bee"]
COUNT, BATCH = 40, 8


@pytest.fixture
def folder(tmp_path):
    """40 real images in two classes: pixel [4, 4] is the image's number, below 50; of synthetic ones it is 50 + id."""
    for i in range(COUNT):
        path = tmp_path / "images" / CLASSES[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((8, 8, 3), 90, np.uint8)
        pixels[4, 4], pixels[:, 5:7], pixels[0] = i, 0, 255
        Image.fromarray(pixels).save(path)
    return tmp_path / "images"


@pytest.mark.matrix
@pytest.mark.parametrize("late", [False, True])
def test_a_learner_is_fitted_on_synthetic_images_through_fastais_own_batch_transforms(folder, late):
    """late: normalisation is added to the wrapped loader, as `vision_learner` does."""
    vision = pytest.importorskip("fastai.vision.all")
    stream = FakeStream((3, 8, 8), CLASSES)
    normalize = vision.Normalize.from_stats((0.5,) * 3, (0.25,) * 3, cuda=False)
    dls = vision.ImageDataLoaders.from_folder(
        folder, valid_pct=0.2, item_tfms=vision.Resize(8), batch_tfms=None if late else normalize, bs=BATCH
    )
    real = dls.train
    dls.loaders[0] = sa.StreamLoader(
        real,
        stream,
        ratio=0.5,
        batch_transform=lambda images: real.after_batch(vision.TensorImage(images)),
        classes=dls.vocab,
    )
    if late:
        dls.add_tfms([normalize], "after_batch")
    arrived = []

    class Told(vision.Callback):
        def before_batch(self):
            images, labels = self.xb[0].as_subclass(torch.Tensor), self.yb[0].as_subclass(torch.Tensor)
            pixels = (images[:, 0, 4, 4] * 0.25 + 0.5) * 255
            made = pixels.round() >= 50
            ids = (pixels[made] - 50).round().long()
            assert self.training or not len(ids), "validation images are real"
            assert torch.equal(labels[made], ids % 2)
            arrived.extend(ids.tolist())

    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64, 2))
    learner = vision.Learner(dls, model, loss_func=torch.nn.CrossEntropyLoss(), cbs=Told())
    with learner.no_bar(), learner.no_logging():
        learner.fit(2)
    assert sorted(arrived) == list(range(2 * 4 * BATCH // 2))
    assert dls.train.stats().realised_ratio == 0.5

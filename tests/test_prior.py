"""The small prior: an ordinary diffusers folder, the same every time, whole or not there at all."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, UNet2DModel

from streamaug.config import PriorConfig
from streamaug.data import ImageSet
from streamaug.errors import ModelError
from streamaug.prior import build_unet, prior_digest, save_atomically, train_prior
from streamaug.sampling.denoisers import inspect

CONFIG = PriorConfig(steps=3, batch_size=8, channels=[8, 16])
NAMED_BEFORE = "f651bc91e8020d0f"  # of `blobs()`, by the version without `prior.labels`


def blobs(seed=0, size=8) -> ImageSet:
    rng = np.random.default_rng(seed)
    return ImageSet.from_arrays(rng.integers(0, 255, (20, 1, size, size)).astype(np.uint8), [0, 1] * 10, ["a", "b"])


def test_the_folder_opens_in_diffusers_and_tells_its_shape(tmp_path):
    seen = []
    path = train_prior(blobs(), CONFIG, tmp_path / "prior", progress=lambda *step: seen.append(step))
    pipeline = DDIMPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 1)
    info = inspect(path)
    assert info.image_shape == (1, 8, 8)
    assert info.num_classes == 0
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_the_same_images_and_settings_give_the_same_weights(tmp_path):
    one = train_prior(blobs(), CONFIG, tmp_path / "one")
    torch.rand(3)
    other = train_prior(blobs(), CONFIG, tmp_path / "other")
    assert inspect(one).digest == inspect(other).digest
    third = train_prior(blobs(), CONFIG.model_copy(update={"seed": 1}), tmp_path / "third")
    assert inspect(one).digest != inspect(third).digest


def test_the_cache_name_follows_pixels_and_settings_but_not_labels_or_order():
    images = blobs()
    assert prior_digest(images, CONFIG) == prior_digest(images.subset(list(range(20))[::-1]), CONFIG)
    assert prior_digest(images, CONFIG) != prior_digest(blobs(1), CONFIG)
    assert prior_digest(images, CONFIG) != prior_digest(images, CONFIG.model_copy(update={"steps": 4}))
    assert prior_digest(images, CONFIG) != prior_digest(images.subset(range(19)), CONFIG)


KNOWN = np.array([0, 1] * 8 + [-1] * 4)
WITH_LABELS = CONFIG.model_copy(update={"labels": True})


def test_a_prior_with_labels_knows_the_classes_and_which_one_is_none(tmp_path, recwarn, caplog):
    path = train_prior(blobs(), WITH_LABELS, tmp_path / "prior", labels=KNOWN, num_classes=2)
    info = inspect(path)
    assert (info.conditioning, info.guidance, info.num_classes, info.null_class) == ("class", "cfg", 3, 2)
    pipeline = DDIMPipeline.from_pretrained(path)
    assert pipeline.unet.config.num_class_embeds == 3
    assert not [warning for warning in recwarn if "streamaug" in str(warning.message)]
    assert not [record for record in caplog.records if "streamaug.json" in record.getMessage()]
    again = train_prior(blobs(), WITH_LABELS, tmp_path / "again", labels=KNOWN, num_classes=2)
    assert inspect(again).digest == info.digest
    other = train_prior(blobs(), WITH_LABELS, tmp_path / "other", labels=1 - KNOWN.clip(0), num_classes=2)
    assert inspect(other).digest != info.digest


def test_images_without_a_label_and_a_tenth_of_the_others_are_of_no_class(tmp_path, monkeypatch):
    told = []
    forward = UNet2DModel.forward
    monkeypatch.setattr(
        UNet2DModel,
        "forward",
        lambda unet, *given, class_labels, **more: (
            told.append(class_labels),
            forward(unet, *given, class_labels=class_labels, **more),
        )[1],
    )
    config = WITH_LABELS.model_copy(update={"steps": 10, "batch_size": 128})
    train_prior(blobs(), config, tmp_path / "prior", labels=KNOWN, num_classes=2)
    shares = torch.bincount(torch.cat(told), minlength=3) / 1280
    torch.testing.assert_close(shares, torch.tensor([0.36, 0.36, 0.28]), atol=0.05, rtol=0)


def test_without_labels_the_prior_and_its_name_are_what_they_were_before_there_were_any(tmp_path):
    assert prior_digest(blobs(), CONFIG, KNOWN) == prior_digest(blobs(), CONFIG) == NAMED_BEFORE
    path = train_prior(blobs(), CONFIG, tmp_path / "prior", labels=KNOWN, num_classes=2)
    assert inspect(path).digest == inspect(train_prior(blobs(), CONFIG, tmp_path / "other")).digest
    assert not (path / "streamaug.json").exists()


def test_the_name_of_a_prior_with_labels_follows_them(tmp_path):
    images = blobs()
    name = prior_digest(images, WITH_LABELS, KNOWN)
    assert name != prior_digest(images, CONFIG)
    assert name != prior_digest(images, WITH_LABELS, 1 - KNOWN.clip(0))
    assert name == prior_digest(images.subset(list(range(20))[::-1]), WITH_LABELS, KNOWN[::-1])


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (None, "no labels were given"),
        (np.full(20, -1), "no image has a label"),
        (np.arange(20), r"labels from 0 to 19 for 2 classes; accepted are 0 to 1"),
        (np.zeros(3, dtype=np.int64), "20 images and labels of shape"),
    ],
)
def test_a_prior_with_labels_is_refused_without_usable_ones(tmp_path, labels, said):
    with pytest.raises(ModelError, match=said):
        train_prior(blobs(), WITH_LABELS, tmp_path / "prior", labels=labels, num_classes=2)
    assert not (tmp_path / "prior").exists()


def test_training_leaves_the_callers_random_state_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    train_prior(blobs(), CONFIG, tmp_path / "prior")
    assert torch.equal(torch.rand(1), expected)


def test_an_image_size_that_cannot_be_halved_names_one_that_can():
    with pytest.raises(ModelError, match=r"data\.image_size to 8"):
        build_unet((1, 9, 9), CONFIG)


def test_a_folder_that_cannot_be_written_is_one_message_and_the_old_model_stays(tmp_path):
    path = train_prior(blobs(), CONFIG, tmp_path / "prior")
    before = inspect(path).digest

    class NoRoom:
        def save_pretrained(self, folder, **_):
            (folder / "half").write_text("x")
            raise OSError(28, "No space left on device")

    with pytest.raises(ModelError, match="No space left"):
        save_atomically(NoRoom(), path)
    assert inspect(path).digest == before
    assert [item.name for item in tmp_path.iterdir()] == ["prior"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="cannot be written"):
        save_atomically(NoRoom(), tmp_path / "file" / "prior")


def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    script = f"""
import resource, sys
from pathlib import Path
sys.path.insert(0, {str(__import__("pathlib").Path(__file__).parent)!r})
import test_prior
from streamaug.errors import ModelError
from streamaug.prior import train_prior
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    train_prior(test_prior.blobs(), test_prior.CONFIG, Path({str(tmp_path / "prior")!r}))
except ModelError as error:
    print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert "refused:" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []

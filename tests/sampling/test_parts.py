"""A batch that is decoded, judged and written in parts is the batch that is decoded whole."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sampling.denoisers.tiny.stable_diffusion import build

from streamaug import config, engine
from streamaug.preparation import prepare
from streamaug.sampling.denoisers import base
from streamaug.stream.ring import emission

SIZE = 7


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    build(root / "model")
    for label, name in enumerate(("cat", "dog")):
        (root / "images" / name).mkdir(parents=True)
        for i in range(3):
            pixels = np.random.default_rng(10 * label + i).integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(root / "images" / name / f"{i}.png")
    text = f"""
cache: {root / "cache"}
data: {{source: folder, root: {root / "images"}, image_size: 32, channels: 3, holdout: 0, validation: 0}}
model: {{path: {root / "model"}, steps: 3, device: cpu, compile: false}}
recipes: [{{kind: noise, depth: [0.6, 1], guidance: [2, 3]}}]
judge: {{steps: 3, min_score: 0.5}}
stream: {{batch_size: {SIZE}}}
"""
    return prepare(config.parse(text))


def slot(beats):
    return SimpleNamespace(
        images=np.zeros((SIZE, 3, 32, 32), np.uint8),
        ids=np.zeros(SIZE, np.int64),
        labels=np.zeros(SIZE, np.int64),
        source=np.full(SIZE, -1, np.int64),
        scores=np.zeros(SIZE, np.float32),
        reasons=np.full(SIZE, 255, np.uint8),
        beat=lambda: beats.append(1),
    )


@pytest.mark.parametrize("at_once", [1, 3, 7])
def test_parts_of_any_size_fill_the_slot_as_the_whole_does(prepared, monkeypatch, at_once):
    made = engine.build(prepared.engine_options)
    made.load_judge(0, prepared.judge_state)
    order = prepared.planner.batch(0, prepared.planner.uniform())
    whole, parts = slot([]), slot([])
    count = made.make(order, whole)
    assert 0 < count < SIZE, "some images are rejected, so that parts are not written one behind the other"
    decoded = []
    decode = made.sampler.denoiser.vae.decode
    monkeypatch.setattr(made.sampler.denoiser.vae, "decode", lambda x: decoded.append(len(x)) or decode(x))
    monkeypatch.setattr(base, "_PIXELS_AT_ONCE", at_once * 32 * 32)
    assert made.make(order, parts) == count
    assert max(decoded) == at_once and sum(decoded) == SIZE
    assert np.abs(parts.images.astype(int) - whole.images.astype(int)).max() <= 1
    np.testing.assert_allclose(parts.scores, whole.scores, atol=1e-4)
    for name in ("ids", "labels", "source", "reasons"):
        np.testing.assert_array_equal(getattr(parts, name)[:count], getattr(whole, name)[:count])
    np.testing.assert_array_equal(parts.reasons, whole.reasons)
    pixels, scores, reasons = made.look(order)
    np.testing.assert_array_equal(pixels[parts.source[:count]], parts.images[:count])
    np.testing.assert_array_equal(scores[parts.source[:count]], parts.scores[:count])
    np.testing.assert_array_equal(reasons, parts.reasons)


@pytest.mark.parametrize("at_once", [3, 7])
@pytest.mark.parametrize("on_the_gpu", [False, True], ids=["slot of the host", "slot on the GPU"])
def test_on_a_gpu_the_slot_is_filled_by_what_is_on_its_way(prepared, monkeypatch, at_once, on_the_gpu):
    """Played by the CPU: one emit for all parts, and whatever it gives goes to an Emission, uncounted."""
    made = engine.build(prepared.engine_options)
    made.judge = None
    order = prepared.planner.batch(0, prepared.planner.uniform())
    expected, given = slot([]), []
    assert made.make(order, expected) == SIZE
    monkeypatch.setattr(base, "_PIXELS_AT_ONCE", at_once * 32 * 32)
    monkeypatch.setattr(made, "device", torch.device("cuda"))
    monkeypatch.setattr(emission, "Emission", lambda *args, **kwargs: given.append((args, kwargs)) or "on its way")
    there = slot([])
    if on_the_gpu:
        there.images = torch.from_numpy(there.images)
    assert made.make(order, there) == "on its way"
    (((for_order, to, images), rest),) = given
    assert for_order is order and to is there and (images is there.images) == on_the_gpu
    assert np.abs(images.numpy().astype(int) - expected.images.astype(int)).max() <= 1
    assert rest["source"].tolist() == list(range(SIZE)) and rest["count"].tolist() == [SIZE]
    np.testing.assert_array_equal(rest["reasons"].numpy(), expected.reasons)
    np.testing.assert_array_equal(rest["scores"].numpy(), expected.scores)


def test_a_pixel_models_images_are_one_part(prepared):
    denoiser = base.Denoiser.__new__(base.Denoiser)
    assert denoiser.decoded_at_once is None

"""The engine: judged images in a slot, a pure function of the order, with every kernel on its path."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from streamaug import engine as engine_module
from streamaug.config import load
from streamaug.errors import MemoryTooSmall
from streamaug.orders import REASONS, OrderBatch
from streamaug.preparation import prepare
from streamaug.stream import Stream


@pytest.fixture(scope="module")
def prepared(small_overrides):
    return prepare(load("digits", small_overrides))


@pytest.fixture(scope="module")
def engine(prepared):
    engine = engine_module.build(prepared.engine_options)
    engine.load_judge(0, prepared.judge_state)
    return engine


def slot(size=16):
    return SimpleNamespace(
        images=np.zeros((size, 1, 8, 8), np.uint8),
        ids=np.zeros(size, np.int64),
        labels=np.zeros(size, np.int64),
        source=np.zeros(size, np.int64),
        scores=np.zeros(size, np.float32),
        reasons=np.zeros(size, np.uint8),
        beat=lambda: None,
    )


def test_a_batch_is_the_same_every_time_and_in_any_sequence(prepared, engine):
    orders = [prepared.planner.batch(k, prepared.planner.uniform()) for k in range(3)]
    first = [slot() for _ in orders]
    counts = [engine.make(order, out) for order, out in zip(orders, first, strict=True)]
    for order, count, before in list(zip(orders, counts, first, strict=True))[::-1]:
        again = slot()
        assert engine.make(order, again) == count
        np.testing.assert_array_equal(again.images[:count], before.images[:count])
        np.testing.assert_array_equal(again.reasons, before.reasons)


def test_the_slot_says_which_order_each_image_came_from(prepared, engine):
    order = prepared.planner.batch(7, prepared.planner.uniform())
    out = slot()
    count = engine.make(order, out)
    assert count == (out.reasons == 0).sum()
    np.testing.assert_array_equal(out.source[:count], np.flatnonzero(out.reasons == 0))
    np.testing.assert_array_equal(out.ids[:count], order.images["id"][out.source[:count]])
    np.testing.assert_array_equal(out.labels[:count], order.images["label"][out.source[:count]])
    pixels, scores, reasons = engine.look(order)
    np.testing.assert_array_equal(pixels[out.source[:count]], out.images[:count])
    np.testing.assert_array_equal(scores[out.source[:count]], out.scores[:count])
    np.testing.assert_array_equal(reasons, out.reasons)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_within_two_grey_levels_on_average(prepared, engine, small_overrides, dtype):
    options = load("digits", [*small_overrides, f"model.dtype={dtype}"])
    half = engine_module.build({**prepared.engine_options, "config": options.model_dump(mode="json")})
    half.load_judge(0, prepared.judge_state)
    order = prepared.planner.batch(3, prepared.planner.uniform())
    pixels, _, _ = half.look(order)
    assert np.abs(pixels.astype(int) - engine.look(order)[0]).mean() <= 2


def test_shallow_images_stay_near_their_anchor_and_deep_ones_leave_it(prepared, engine):
    plan = prepared.planner
    order = plan.batch(1, plan.uniform())
    distances = []
    for depth in (0.25, 1.0):
        start = plan.schedule.start_of(depth)
        images = order.images.copy()
        images["row_b"], images["interp"] = -1, 0
        images["latent_w"] = (plan.schedule.signal[start], 0, plan.schedule.noise[start])
        pixels, _, _ = engine.look(OrderBatch(0, start, 0, 0, images))
        anchors = prepared.labelled.images[images["row_a"]].astype(float)
        distances.append(np.abs(pixels - anchors).mean())
    assert distances[0] < 0.7 * distances[1]


def test_a_nan_from_the_network_drops_that_image_alone(prepared, engine, monkeypatch):
    order = prepared.planner.batch(2, prepared.planner.uniform())
    _, _, before = engine.look(order)
    decode = engine.sampler.denoiser.decode

    def broken(x):
        images = decode(x).clone()
        images[3, 0, 4, 4] = float("nan")
        return images

    monkeypatch.setattr(engine.sampler.denoiser, "decode", broken)
    out = slot()
    engine.make(order, out)
    assert REASONS[out.reasons[3]] == "non_finite"
    others = np.arange(16) != 3
    np.testing.assert_array_equal(out.reasons[others], before[others])


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("streamaug.sampling.latents", "perturb"),
        ("streamaug.sampling.sampler", "step"),
        ("streamaug.engine", "emit"),
        ("streamaug.kernels.perturb", "normal"),
    ],
)
def test_a_kernel_that_raises_fails_the_stream(prepared, monkeypatch, module, name):
    def broken(*args, **kwargs):
        raise RuntimeError(f"{name} was called")

    __import__(module)
    monkeypatch.setattr(sys.modules[module], name, broken)
    local = prepared.config.stream.model_copy(update={"backend": "local"})
    stream = Stream.from_prepared(_with_stream(prepared, local))
    with stream, pytest.raises(Exception, match=f"{name} was called"):
        stream.take(1)


def _with_stream(prepared, stream_config):
    from dataclasses import replace

    return replace(prepared, config=prepared.config.model_copy(update={"stream": stream_config}))


def test_a_loader_whose_collect_raises_fails_too(prepared, monkeypatch):
    import torch
    from streamaug.kernels import collect
    from torch.utils.data import DataLoader, TensorDataset

    import streamaug as sa

    def broken(*args, **kwargs):
        raise RuntimeError("collect was called")

    monkeypatch.setattr(collect, "collect", broken)
    local = prepared.config.stream.model_copy(update={"backend": "local"})
    data = TensorDataset(torch.rand(32, 1, 8, 8), torch.arange(32) % 10)
    with Stream.from_prepared(_with_stream(prepared, local)) as stream:
        loader = sa.StreamLoader(DataLoader(data, batch_size=16), stream, ratio=0.5)
        with pytest.raises(RuntimeError, match="collect was called"):
            next(iter(loader))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("not enough memory: you")]
)
def test_a_batch_that_does_not_fit_names_one_that_does(prepared, engine, monkeypatch, error):
    original, sizes = engine.sampler.sample, []

    def sample(latents, order, rows, on_evaluation=None):
        sizes.append(len(order))
        if len(order) > 4:
            raise error
        return original(latents, order, rows, on_evaluation)

    monkeypatch.setattr(engine.sampler, "sample", sample)
    order = prepared.planner.batch(0, prepared.planner.uniform())
    with pytest.raises(MemoryTooSmall, match=r"stream\.batch_size 16 .* 4 fits: --set stream\.batch_size=4"):
        engine.look(order)
    assert sizes == [16, 8, 4]

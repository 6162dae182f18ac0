"""Attention reused between evaluations: how often, never across batches, and still a function of the order."""

import pytest
import torch
from sampling.denoisers.harness import orders, sampler
from sampling.denoisers.tiny import dit, unet2d

from streamaug.config import load
from streamaug.errors import ConfigError, ModelError
from streamaug.sampling import denoisers
from streamaug.sampling.denoisers import LoadSettings
from streamaug.sampling.execution import Execution, check_execution, decide

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("dit")
    dit.build(path)
    return path


def of(folder, every):
    denoiser = denoisers.load(denoisers.inspect(folder), LoadSettings(CPU, attention_cache=every))
    return sampler(denoiser, denoisers.load_scheduler(folder), 6)


def start(folder, seed=0):
    shape = denoisers.inspect(folder).latent_shape
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))


def test_attention_is_computed_at_every_nth_evaluation(folder, monkeypatch):
    made = of(folder, 3)
    layer = next(each for name, each in made.denoiser.network.named_modules() if name.endswith("attn1"))
    calls = []
    original = layer.processor.__class__.__call__
    monkeypatch.setattr(
        layer.processor.__class__,
        "__call__",
        lambda self, attn, *a, **k: (calls.append(attn), original(self, attn, *a, **k))[1],
    )
    made.sample(start(folder), orders(2, classes=3))
    assert sum(each is layer for each in calls) == 2


def test_an_image_is_near_the_exact_one_and_owes_nothing_to_the_batch_before(folder):
    exact, cached = of(folder, 1), of(folder, 2)
    order = orders(2, classes=3)
    once = cached.sample(start(folder), order)
    cached.sample(start(folder, seed=1), order)
    assert torch.equal(cached.sample(start(folder), order), once)
    plain = exact.sample(start(folder), order)
    assert 0 < (once - plain).abs().max() < plain.std()


def test_a_guidance_interval_changes_the_batch_shape_and_starts_afresh(folder):
    made = of(folder, 3)
    made.guidance_interval = (0.3, 0.7)
    assert made.sample(start(folder), orders(2, classes=3, guidance=2.0)).isfinite().all()


def test_a_network_without_attention_is_refused(tmp_path):
    unet2d.build(
        tmp_path, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, add_attention=False
    )
    with pytest.raises(ModelError, match="attention_cache"):
        denoisers.load(denoisers.inspect(tmp_path), LoadSettings(CPU, attention_cache=2))


def test_it_is_neither_compiled_nor_captured():
    def never() -> float:
        raise AssertionError("measured for nothing")

    config = load("digits", ["model.attention_cache=2"])
    assert decide(config, CPU, "model", never) == Execution()
    with pytest.raises(ConfigError, match="neither be compiled nor captured"):
        check_execution(load("digits", ["model.attention_cache=2", "model.compile=true"]), CPU)

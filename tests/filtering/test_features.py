"""The probe on the denoiser's features: what it reads, what travels, and that it tells classes apart."""

import numpy as np
import pytest
import torch

from streamaug.config import AugmentConfig, load
from streamaug.engine import build
from streamaug.errors import ConfigError
from streamaug.filtering.configured import judge_features
from streamaug.filtering.features import Features, Probed
from streamaug.filtering.judge import pack_state, unpack_state
from streamaug.preparation import prepare
from streamaug.training.classifiers import build_classifier


@pytest.fixture(scope="module")
def prepared(small_overrides):
    return prepare(load("digits", [*small_overrides, "judge.features=true"]))


def images(count):
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_features_are_those_of_the_middle_of_the_network(prepared):
    features: Features = prepared.features
    network = features.denoiser.network
    seen = []
    hook = network.mid_block.register_forward_hook(lambda module, given, output: seen.append(output))
    network(images(3) * 2 - 1, features.timestep)
    hook.remove()
    found = features(images(3))
    assert found.shape == (3, features.size)
    assert torch.equal(found, torch.nn.functional.adaptive_avg_pool2d(seen[0], min(4, seen[0].shape[-1])).flatten(1))


def test_reading_features_leaves_the_network_as_it_was(prepared):
    denoiser = prepared.features.denoiser
    before = denoiser.network(images(2), 100).sample
    prepared.features(images(2))
    assert torch.equal(denoiser.network(images(2), 100).sample, before)


def test_the_probe_learns_what_the_labelled_images_show(prepared):
    data = prepared.labelled
    classifier = build_classifier("small_cnn", channels=1, image_size=8, num_classes=10)
    probed = Probed(classifier, prepared.features, 10).eval()
    pixels, labels = torch.from_numpy(data.images).float() / 255, torch.from_numpy(data.labels)
    probed.fit_probe(data, AugmentConfig(), seed=0)
    own = (probed.features(pixels) - probed.mean) / probed.std
    assert (probed.probe(own).argmax(1) == labels).float().mean() > 0.9
    again = Probed(classifier, prepared.features, 10)
    again.fit_probe(data, AugmentConfig(), seed=0)
    assert torch.equal(again.probe.weight, probed.probe.weight)


def test_the_judge_averages_both_opinions(prepared):
    probed = prepared.judge.classifier
    pixels = images(4)
    with torch.no_grad():
        classifier = torch.softmax(probed.classifier(pixels), 1)
        probe = torch.softmax(probed.probe((probed.features(pixels) - probed.mean) / probed.std), 1)
        torch.testing.assert_close(torch.softmax(probed(pixels), 1), (classifier + probe) / 2)


def test_the_producer_judges_as_the_trainer_does(prepared):
    engine = build(prepared.engine_options)
    engine.load_judge(0, prepared.judge_state)
    labels = torch.arange(4)
    mine = prepared.judge.score(images(4) * 2 - 1, labels)
    theirs = engine.judge.score(images(4) * 2 - 1, labels)
    assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1])


def test_the_denoiser_does_not_travel_with_the_judge(prepared):
    weights = sum(value.numel() for value in prepared.features.denoiser.network.state_dict().values())
    assert len(prepared.judge_state) < 4 * weights
    engine = build(prepared.engine_options)
    unpack_state(engine.judge, prepared.judge_state)
    np.testing.assert_array_equal(pack_state(engine.judge), prepared.judge_state)


def test_a_family_without_features_is_refused_by_name(prepared, monkeypatch):
    from streamaug.sampling.denoisers import unet2d

    monkeypatch.delattr(unet2d, "FEATURES")
    with pytest.raises(ConfigError, match=r"judge\.features: UNet2DModel gives none"):
        judge_features(prepared.config, prepared.model)

"""The training loop, its augmentation and its classifiers."""

import itertools
import math

import pytest
import torch
from torch import nn

from streamaug.config import AugmentConfig, TrainConfig
from streamaug.errors import ConfigError
from streamaug.training.augment import augment
from streamaug.training.classifiers import SmallCNN, build_classifier
from streamaug.training.trainer import accuracy, forever, one_cycle, train

STILL = AugmentConfig(rotation=0, shift=0, scale=0)


def batches(seed=0, n=64):
    """Bright left half is class 1, bright right half is class 0."""
    random = torch.Generator().manual_seed(seed)
    while True:
        labels = torch.randint(2, (n,), generator=random)
        images = torch.rand(n, 1, 8, 8, generator=random) * 0.3
        images[labels == 1, :, :, :4] += 0.6
        images[labels == 0, :, :, 4:] += 0.6
        yield images, labels


def fit(**settings):
    torch.manual_seed(0)
    model = SmallCNN(1, 8, 2)
    config = TrainConfig(**{"steps": 30, "augment": STILL, **settings})
    test = [next(batches(seed=9, n=200))]
    return train(model, batches(), config, seed=0, test=test, eval_every=10), model


def test_a_separable_problem_is_learned_in_a_few_steps():
    result, _ = fit()
    assert result.accuracy > 0.95
    assert [step for step, _ in result.curve] == [10, 20, 30]
    assert len(result.spans) == result.steps == 30


def test_the_same_seed_gives_the_same_weights():
    (_, one), (_, other) = fit(), fit()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_deadline_ends_training_by_the_clock():
    model = SmallCNN(1, 8, 2)
    result = train(model, batches(), TrainConfig(steps=10**9, augment=STILL), seed=0, deadline_seconds=2.0)
    assert result.steps >= 1
    assert result.seconds >= 2.0
    assert math.isnan(result.accuracy)


def test_the_learning_rate_rises_and_falls():
    factors = [one_cycle(step / 100) for step in range(100)]
    assert factors[10] == pytest.approx(1.0)
    assert all(a <= b for a, b in itertools.pairwise(factors[:11]))
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))
    assert min(factors) > 0


def test_forever_repeats_epochs_and_refuses_nothing():
    source = forever([1, 2])
    assert [next(source) for _ in range(5)] == [1, 2, 1, 2, 1]
    with pytest.raises(ValueError, match="empty"):
        next(forever([]))


def test_augmentation_without_strength_changes_nothing():
    images = torch.rand(4, 3, 9, 9)
    torch.testing.assert_close(augment(images, STILL, torch.Generator()), images, atol=1e-5, rtol=1e-5)


def test_a_shift_moves_by_at_most_its_share_and_fills_with_black():
    dot = torch.zeros(200, 1, 21, 21)
    dot[:, :, 10, 10] = 1
    moved = augment(dot, AugmentConfig(rotation=0, scale=0, shift=0.25), torch.Generator().manual_seed(0))
    mass = moved.sum((1, 2, 3))
    torch.testing.assert_close(mass, torch.ones(200), atol=1e-3, rtol=1e-3)
    at = torch.arange(21.0)
    row = (moved.sum((1, 3)) * at).sum(1) / mass - 10
    column = (moved.sum((1, 2)) * at).sum(1) / mass - 10
    for offset in (row, column):
        assert offset.abs().max() <= 0.25 * 21 + 1e-3
        assert offset.abs().max() > 0.2 * 21
    white = torch.ones(50, 1, 8, 8)
    assert augment(white, AugmentConfig(shift=0.25), torch.Generator().manual_seed(0)).min() == 0


def test_flips_are_about_half():
    ramp = torch.linspace(0, 1, 8).expand(400, 1, 8, 8)
    flipped = augment(ramp, AugmentConfig(rotation=0, scale=0, shift=0, flip=True), torch.Generator().manual_seed(0))
    share = (flipped[:, 0, 0, 0] > 0.5).float().mean()
    assert 0.4 < share < 0.6


@pytest.mark.parametrize("size", [1, 5, 8, 28, 64])
def test_the_small_network_takes_any_size(size):
    model = build_classifier("small_cnn", channels=3, image_size=size, num_classes=7)
    assert model(torch.zeros(2, 3, size, size)).shape == (2, 7)


def test_torchvision_models_are_known_by_name():
    model = build_classifier("resnet18", channels=3, image_size=32, num_classes=7)
    assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


def test_an_unknown_classifier_names_the_nearest():
    with pytest.raises(ConfigError, match=r"did you mean 'resnet18'\?"):
        build_classifier("resnet81", channels=3, image_size=32, num_classes=2)
    with pytest.raises(ConfigError, match="3-channel"):
        build_classifier("resnet18", channels=1, image_size=32, num_classes=2)


def test_accuracy_counts_and_restores_the_mode():
    class Fixed(nn.Module):
        def forward(self, images):
            return torch.tensor([[1.0, 0.0]]).expand(len(images), 2)

    model = Fixed().train()
    parts = [(torch.zeros(n, 1, 2, 2), torch.tensor(labels)) for n, labels in ((4, [0] * 4), (6, [0] * 3 + [1] * 3))]
    assert accuracy(model, parts) == 0.7
    assert model.training

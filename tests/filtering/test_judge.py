"""The judge: what passes, what does not and why, thresholds from real images, and its state as bytes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from streamaug.config import JudgeConfig, parse
from streamaug.data import ImageSet
from streamaug.filtering.calibration import build_judge, calibrate, fit_judge
from streamaug.filtering.judge import Judge, pack_state, score_unjudged, unpack_state
from streamaug.orders import REASONS


class Says(nn.Module):
    """A classifier that answers with given probabilities, whatever it sees."""

    def __init__(self, *rows):
        super().__init__()
        self.probability = torch.tensor(rows)

    def forward(self, images):
        return self.probability[: len(images)].log()


def images(n=1, seed=0):
    return torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def reason(row, label, **config):
    judge = Judge(Says(row), 4, JudgeConfig(**config))
    _, reasons = judge.score(images(), torch.tensor([label]))
    return REASONS[int(reasons[0])]


@pytest.mark.parametrize(
    ("row", "label", "expected"),
    [
        ([0.97, 0.01, 0.01, 0.01], 0, "accepted"),  # agrees
        ([0.30, 0.25, 0.25, 0.20], 0, "accepted"),  # agrees, if barely
        ([0.45, 0.40, 0.10, 0.05], 1, "accepted"),  # unsure, and the label is likely enough
        ([0.45, 0.15, 0.30, 0.10], 1, "unlikely_label"),  # unsure, and the label is not
        ([0.85, 0.13, 0.01, 0.01], 1, "confidently_wrong"),
        ([0.85, 0.13, 0.01, 0.01], 3, "confidently_wrong"),
    ],
)
def test_the_fixed_rule(row, label, expected):
    assert reason(row, label) == expected


def test_a_label_outside_the_top_k_is_unlikely():
    row = [0.26, 0.25, 0.25, 0.24]
    assert reason(row, 3, top_k=4) == "accepted"
    assert reason(row, 3, top_k=3) == "unlikely_label"


def test_agreement_is_not_enough_below_the_least_score():
    row = [0.55, 0.20, 0.15, 0.10]
    assert reason(row, 0, min_score=0.5) == "accepted"
    assert reason(row, 0, min_score=0.6) == "unlikely_label"


def test_the_too_easy_are_cut_when_asked():
    row = [0.97, 0.01, 0.01, 0.01]
    assert reason(row, 0, too_easy=0.99) == "accepted"
    assert reason(row, 0, too_easy=0.95) == "too_easy"


@given(
    row=st.lists(st.floats(0.01, 1), min_size=4, max_size=4),
    label=st.integers(0, 3),
    bad=st.sampled_from(["nan", "inf", "flat"]),
)
def test_non_finite_and_flat_images_never_pass(row, label, bad):
    judge = Judge(Says([value / sum(row) for value in row]), 4, JudgeConfig())
    image = images()
    if bad == "flat":
        image[:] = 0.3
    else:
        image[0, 0, 1, 2] = float(bad)
    score, reasons = judge.score(image, torch.tensor([label]))
    assert REASONS[int(reasons[0])] == ("no_contrast" if bad == "flat" else "non_finite")
    assert torch.isfinite(score).all()
    _, unjudged = score_unjudged(image)
    assert unjudged[0] == reasons[0]


def test_one_broken_image_leaves_its_batch_alone():
    judge = Judge(nn.Sequential(nn.Flatten(), nn.Linear(16, 4)), 4, JudgeConfig(floor=0.0, confident=1.0, top_k=4))
    batch, labels = images(5), torch.arange(5) % 4
    score, reasons = judge.score(batch, labels)
    broken = batch.clone()
    broken[2, 0, 0, 0] = float("nan")
    score_after, reasons_after = judge.score(broken, labels)
    others = [0, 1, 3, 4]
    assert torch.equal(score[others], score_after[others])
    assert torch.equal(reasons[others], reasons_after[others])
    assert REASONS[int(reasons_after[2])] == "non_finite"


def test_thresholds_differ_by_class():
    judge = Judge(Says([0.5, 0.3, 0.2, 0.0]), 4, JudgeConfig())
    judge.floor[1] = 0.4
    _, reasons = judge.score(images(), torch.tensor([1]))
    assert REASONS[int(reasons[0])] == "unlikely_label"
    judge.floor[1] = 0.1
    _, reasons = judge.score(images(), torch.tensor([1]))
    assert REASONS[int(reasons[0])] == "accepted"


def stripes(per_class: int) -> ImageSet:
    """Two classes a small network tells apart: horizontal and vertical stripes, with noise."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 80, (2 * per_class, 1, 8, 8))
    pixels[:per_class, :, ::2] += 150
    pixels[per_class:, :, :, ::2] += 150
    return ImageSet.from_arrays(pixels.astype(np.uint8), np.repeat([0, 1], per_class), ["rows", "columns"])


def config(*overrides):
    return parse("prior: {}\ntrain: {augment: {shift: 0, rotation: 0, scale: 0}}\njudge: {steps: 40}", "x", overrides)


def test_a_fitted_judge_agrees_with_its_images_and_is_the_same_every_time():
    data = stripes(6)
    judge = fit_judge(config(), data, seed=1)
    score, reasons = judge.score(torch.from_numpy(data.images).float() / 127.5 - 1, torch.from_numpy(data.labels))
    assert (reasons == 0).all()
    assert score.min() > 0.5
    torch.rand(3)
    assert np.array_equal(pack_state(judge), pack_state(fit_judge(config(), data, seed=1)))
    assert not np.array_equal(pack_state(judge), pack_state(fit_judge(config(), data, seed=2)))


def test_few_images_keep_the_fixed_rule_and_many_calibrate_each_class():
    few = fit_judge(config(), stripes(9), seed=0)
    assert few.floor.tolist() == pytest.approx([0.2, 0.2])
    assert few.confident.tolist() == pytest.approx([0.8, 0.8])
    many = stripes(40)
    judge = build_judge(config("judge.quantile=0.1"), 2)
    calibrate(judge, many, config("judge.quantile=0.1"))
    images = torch.from_numpy(many.images).float() / 127.5 - 1
    probability = torch.softmax(judge(images), 1)[torch.arange(80), torch.from_numpy(many.labels)].detach()
    for label in (0, 1):
        own = probability[torch.from_numpy(many.labels) == label]
        assert (own < judge.floor[label]).float().mean() <= 0.1
        assert judge.floor[label] <= 0.2
        assert 0.5 <= judge.confident[label] <= 0.8


def test_state_survives_a_trip_through_bytes():
    one, other = build_judge(config(), 3), build_judge(config(), 3)
    one.floor[1] = 0.33
    unpack_state(other, pack_state(one))
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    with pytest.raises(ValueError, match="bytes"):
        unpack_state(other, np.append(pack_state(one), np.uint8(0)))

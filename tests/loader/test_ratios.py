"""The synthetic share as a schedule, by class, from YAML, set while training, and after a resume."""

import copy
import json
import logging

import numpy as np
import pytest
import torch
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from streamaug.config import LoaderConfig, Recipe, StreamConfig, parse
from streamaug.errors import ConfigError, UsageError
from streamaug.loader import StreamLoader, ratios
from streamaug.loader.frequencies import class_counts
from streamaug.loader.ratios import Shares, as_config, from_config
from streamaug.orders import Planner, Schedule
from streamaug.stream.stream import Stream

from .fakes import DIGITS, FakeStream, Images, listed, real_loader

PETS = ["cat", "dog", "owl"]


class Pets(Images):
    """Real images of three classes, 24 cats to 12 dogs to 4 owls."""

    classes = PETS
    targets = [0] * 24 + [1] * 12 + [2] * 4

    def __getitem__(self, index):
        return super().__getitem__(index)[0], self.targets[index]


def pets(ratio, *, mode="replace", stream=None, shuffle=True, **options):
    real = DataLoader(Pets(), batch_size=8, shuffle=shuffle, generator=torch.Generator().manual_seed(1))
    return StreamLoader(real, stream or pet_stream(), ratio, mode, with_ids=True, **options)


def pet_stream(**options):
    return FakeStream(class_names=PETS, **options)


# Schedules.


def test_a_warm_up_rises_in_a_straight_line_and_stays():
    schedule = ratios.warmup(0.5, steps=100, start=0.1)
    assert [schedule(step) for step in (0, 25, 50, 100, 9999)] == [0.1, 0.2, 0.3, 0.5, 0.5]


def test_a_cosine_falls_from_its_ratio_to_its_end_after_its_own_warm_up():
    schedule = ratios.cosine(0.8, steps=100, end=0.2)
    assert [schedule(step) for step in (0, 50, 100, 9999)] == [0.8, 0.5, 0.2, 0.2]
    assert all(schedule(step) >= schedule(step + 1) for step in range(110))
    warmed = ratios.cosine(0.8, steps=110, end=0.2, warmup=10)
    assert [warmed(step) for step in (0, 5, 10, 60, 110)] == [0.0, 0.4, 0.8, 0.5, 0.2]


def test_a_scheduled_ratio_delivers_the_sum_of_what_it_asked_within_one_image():
    schedule = ratios.warmup(0.5, steps=7)
    loader = StreamLoader(real_loader(), FakeStream(), schedule, with_ids=True)
    made = [int((ids >= 0).sum()) for _ in range(2) for _, _, ids in loader]
    assert made[0] == 0 and made[-1] == 4
    assert abs(sum(made) - sum(8 * schedule(step) for step in range(10))) < 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ratios.warmup(1.5, steps=10), r"ratio is a synthetic share in \[0, 1\), got 1.5"),
        (lambda: ratios.warmup(0.5, steps=10, start=-1), "start is a synthetic share"),
        (lambda: ratios.warmup(0.5, steps=0), "steps is a number of batches from 1, got 0"),
        (lambda: ratios.cosine(0.5, steps=10, end=1.0), "end is a synthetic share"),
        (lambda: from_config({"schedule": "linear", "ratio": 0.5}), "accepted are warmup and cosine"),
        (lambda: from_config({"schedule": "warmup", "ratio": 0.5}), "missing 1 required positional argument: 'steps'"),
        (lambda: ratios.cosine(0.5, steps=10, warmup=10), "warmup is a number of batches from 0 to below steps=10"),
    ],
)
def test_schedules_that_cannot_be_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()


# By class.


@pytest.mark.parametrize(
    ("ratio", "shares"),
    [
        ({"cat": 0.5, "dog": 0.2, "owl": 0.0}, [0.5, 0.2, 0.0]),
        ({0: 0.5, "default": 0.25}, [0.5, 0.25, 0.25]),
        ({np.int64(2): 0.75, "dog": 0.5, "cat": 0}, [0.0, 0.5, 0.75]),
        ({"default": 0.3}, [0.3, 0.3, 0.3]),
    ],
)
def test_a_ratio_by_class_sets_the_share_of_the_whole_and_the_class_weights_of_the_stream(ratio, shares):
    beside = np.array([24, 12, 4]) * np.array(shares) / (1 - np.array(shares))
    for mode in ("replace", "append"):
        loader = pets(ratio, mode=mode)
        for _ in range(6):
            list(loader)
        whole = beside.sum() / (beside.sum() + 40)
        stats = loader.stats()
        assert abs(stats.synthetic - whole * (stats.real + stats.synthetic)) < 1
        weights = np.array(loader.stream.class_weights)
        np.testing.assert_allclose(weights / weights.sum(), beside / beside.sum())
        assert loader.stream.replans == 1 and loader.stream.asked_ratio == pytest.approx(whole)


def test_by_class_numbers_are_real_labels_where_the_stream_orders_its_classes_differently():
    stream = FakeStream(class_names=["owl", "cat", "dog"])
    list(pets({0: 0.5, "default": 0.0}, stream=stream))
    assert np.flatnonzero(stream.class_weights).tolist() == [1]


def test_a_function_that_gives_no_ratio_is_named_with_the_step():
    def rising(step):
        return step / 2

    batches = iter(StreamLoader(real_loader(), FakeStream(), rising))
    next(batches), next(batches)
    with pytest.raises(UsageError, match=r"ratio=.*rising.* at step 2: ratio is .*got 1.0"):
        next(batches)


def test_a_ratio_of_nothing_leaves_the_stream_alone():
    loader = pets({"default": 0})
    list(loader)
    assert loader.stream.calls == loader.stream.replans == 0 and loader.state_dict()["stream"] is None


@pytest.mark.parametrize(
    ("ratio", "message"),
    [
        ({"cat": 0.5}, r"nothing for 2 of 3 classes \('dog', 'owl'\); name them all, or add 'default': 0.0"),
        (
            {"cat": 0.5, "dogg": 0.1, "default": 0},
            r"'dogg', which is no class \(did you mean 'dog'\?\); classes: 'cat'",
        ),
        ({3: 0.5, "default": 0}, "or their numbers, 0 to 2"),
        ({"cat": 1.0, "default": 0}, r"class 'cat': ratio is the synthetic share .* got 1.0"),
        ({"cat": 0.1, 0: 0.2, "default": 0}, "class 'cat' is given twice"),
        ({}, "nothing for 3 of 3"),
    ],
)
def test_a_ratio_by_class_that_cannot_be_is_refused_at_once(ratio, message):
    with pytest.raises(UsageError, match=message):
        pets(ratio)


def test_how_often_classes_come_is_read_from_the_dataset_and_its_sampler():
    images, labels = torch.zeros(6, 1, 8, 8), torch.tensor([0, 0, 0, 1, 1, 2])
    tensors = TensorDataset(images, labels)
    weighted = WeightedRandomSampler([1.0, 1.0, 1.0, 3.0, 3.0, 6.0], 6)
    loaders = {
        "tensors": (DataLoader(tensors), [3, 2, 1]),
        "targets": (DataLoader(Pets()), [24, 12, 4]),
        "subset": (DataLoader(Subset(Pets(), [0, 1, 30])), [2, 1, 0]),
        "both": (DataLoader(ConcatDataset([tensors, Subset(tensors, [5, 5])])), [3, 2, 3]),
        "sampler": (DataLoader(tensors, sampler=SubsetRandomSampler([0, 5])), [1, 0, 1]),
        "weighted": (DataLoader(tensors, sampler=weighted), [3, 6, 6]),
    }
    for name, (loader, expected) in loaders.items():
        assert class_counts(loader, 3).tolist() == expected, name
    assert class_counts(DataLoader(Images()), 10) is None
    assert class_counts(DataLoader(TensorDataset(images, labels + 1)), 3) is None
    assert class_counts([1], 3) is None


def test_where_frequencies_are_not_known_it_is_said_and_class_counts_gives_them(caplog):
    batches = list(DataLoader(Pets(), batch_size=8))
    loader = StreamLoader(batches, pet_stream(), {"cat": 0.5, "default": 0.0})
    list(loader)
    assert "taken as equally frequent" in caplog.text
    assert loader.stats().synthetic == pytest.approx(40 / 4, abs=1)  # a third of cats, doubled: a quarter of all
    told = StreamLoader(batches, pet_stream(), {"cat": 0.5, "default": 0.0}, class_counts=[24, 12, 4])
    list(told)
    assert told.stats().synthetic == pytest.approx(40 * 24 / 64, abs=1)
    with pytest.raises(UsageError, match="one number of real images for each of the 3 classes"):
        list(StreamLoader(batches, pet_stream(), {"default": 0.5}, class_counts=[1, 2]))


def test_defer_knows_its_length_under_a_ratio_by_class():
    loader = pets({"cat": 0.5, "default": 0.1}, displaced="defer")
    for _ in range(2):
        expected = len(loader)
        assert len(list(loader)) == expected


def real_stream(names=PETS, rejects=None):
    schedule = Schedule(np.linspace(0, 1, 11), np.linspace(1, 0, 11))
    return Stream(
        Planner(np.arange(30) % 3, 3, schedule, [Recipe(kind="noise")], batch_size=12, seed=1),
        engine="loader.engine:build",
        engine_options={},
        image_shape=(1, 8, 8),
        config=StreamConfig(batch_size=12, in_flight=2, backend="local"),
        class_names=names,
    )


def test_each_class_of_a_real_stream_gets_its_share_before_and_after_a_change():
    with real_stream() as stream:
        loader = pets({"cat": 0.5, "dog": 0.2, "owl": 0.0}, stream=stream, mode="append")
        for ratio in ({"cat": 0.5, "dog": 0.2, "owl": 0.0}, {"cat": 0.0, "dog": 0.0, "owl": 0.8}):
            loader.ratio = ratio
            counts = np.zeros((2, 3))
            for _ in range(10):
                for _, labels, ids in loader:
                    for made in (0, 1):
                        counts[made] += np.bincount(labels[(ids >= 0) == bool(made)].numpy(), minlength=3)
            np.testing.assert_allclose(counts[1] / counts.sum(0), list(ratio.values()), atol=0.02)


# Set while training, and resumed.

CHANGES = [0.25, 0, {"cat": 0.6, "default": 0.1}, {"owl": 0.9, "default": 0.0}, ratios.warmup(0.6, steps=9)]


@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize("stop", [2, 3, 4, 7])
def test_a_ratio_set_while_training_survives_a_resume(change, stop):
    def run(loader, first, last):
        delivered = []
        step = first
        while step < last:
            for batch in loader:
                delivered.append(listed(batch))
                step += 1
                if step == 3:
                    loader.ratio = change
                if step == last:
                    return delivered
        return delivered

    with real_stream() as stream:
        whole = run(pets({"cat": 0.5, "default": 0.2}, stream=stream), 0, 12)
    with real_stream() as stream:
        first = pets({"cat": 0.5, "default": 0.2}, stream=stream)
        delivered = run(first, 0, stop)
        state = json.loads(json.dumps({k: v for k, v in first.state_dict().items() if k != "real"}))
        state["real"] = copy.deepcopy(first.state_dict()["real"])
    with real_stream() as stream:
        second = pets({"cat": 0.5, "default": 0.2}, stream=stream)
        second.load_state_dict(state)
        delivered += run(second, stop, 12)
    assert delivered == whole


def test_a_script_that_was_given_another_ratio_wins_over_the_state_and_says_so(caplog):
    loader = StreamLoader(real_loader(), FakeStream(), ratio=0.5)
    loader.ratio = 0
    state = loader.state_dict()
    resumed = StreamLoader(real_loader(), FakeStream(), ratio=0.25)
    resumed.load_state_dict(state)
    assert resumed.ratio == 0.25 and "0.0 when the state was saved" in caplog.text
    same = StreamLoader(real_loader(), FakeStream(), ratio=0.5)
    same.load_state_dict(state)
    assert same.ratio == 0
    loader.ratio = lambda step: 0.1
    caplog.clear()
    same.load_state_dict(loader.state_dict())
    assert "set it again" in caplog.text


def test_setting_one_number_again_gives_the_classes_their_default_weights_back():
    loader = pets({"cat": 0.5, "default": 0.0})
    list(loader)
    loader.ratio = 0
    list(loader)
    assert loader.stream.replans == 1
    loader.ratio = 0.5
    list(loader)
    assert loader.stream.replans == 2 and loader.stream.class_weights is None


# In the configuration.


@pytest.mark.parametrize(
    ("yaml", "expected"),
    [
        ("0.25", 0.25),
        ("{cat: 0.5, default: 0.2}", {"cat": 0.5, "default": 0.2}),
        ("{0: 0.5, default: 0}", {0: 0.5, "default": 0.0}),
        ("{schedule: warmup, ratio: 0.5, steps: 10}", ratios.warmup(0.5, 10)),
        (
            "{schedule: cosine, ratio: 0.5, steps: 10, end: 0.1, warmup: 2}",
            ratios.cosine(0.5, 10, end=0.1, warmup=2),
        ),
    ],
)
def test_every_form_is_written_in_yaml_and_reaches_the_loader(yaml, expected):
    config = parse(f"prior: {{}}\nloader: {{ratio: {yaml}}}")
    loader = pets(None, stream=pet_stream(loader_config=config.loader))
    assert loader.ratio == expected
    again = parse(config.to_yaml())
    assert from_config(as_config(from_config(again.loader.ratio))) == from_config(as_config(expected))
    assert config.digest("loader") == parse(config.to_yaml()).digest("loader")
    list(loader)


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        ("{cat: 1.5}", ["loader.ratio: class 'cat': input should be less than 1, got 1.5"]),
        ("{cat: much}", ["loader.ratio: class 'cat': expected a number in [0, 1), got 'much'"]),
        ("{}", ["loader.ratio", "empty"]),
        ("[0.5]", ["loader.ratio: expected a number in [0, 1), got [0.5]"]),
        ("{schedule: warmupp, ratio: 0.5, steps: 9}", ["accepted are warmup and cosine", "did you mean 'warmup'?"]),
        ("{schedule: warmup, ratio: 0.5, end: 0.1, steps: 9}", ["warmup takes no 'end'", "ratio, start, steps"]),
        ("{schedule: cosine, ratio: 0.5}", ["cosine needs steps"]),
        ("{schedule: cosine, ratio: 0.5, steps: 0}", ["steps is a number of batches from 1, got 0"]),
        ("{schedule: cosine, ratio: 0.5, steps: 5, warmup: 5}", ["warmup is a number of batches", "got 5"]),
        ("{schedule: warmup, ratio: 1.0, steps: 5}", ["loader.ratio: ratio: input should be less than 1, got 1.0"]),
    ],
)
def test_what_cannot_be_a_ratio_in_yaml_is_one_sentence(yaml, words):
    with pytest.raises(ConfigError) as refusal:
        parse(f"prior: {{}}\nloader: {{ratio: {yaml}}}")
    message = str(refusal.value)
    assert "\n" not in message and all(word in message for word in words)


def test_the_largest_share_of_every_form():
    forms = [
        (0.4, 0.4),
        ({"cat": 0.5, "default": 0.7}, 0.7),
        ({"schedule": "warmup", "ratio": 0.3, "steps": 9, "start": 0.6}, 0.6),
        ({"schedule": "cosine", "ratio": 0.3, "steps": 9}, 0.3),
    ]
    assert [LoaderConfig(ratio=ratio).peak_ratio for ratio, _ in forms] == [peak for _, peak in forms]


def test_shares_by_class_are_exact_fractions():
    shares = Shares({"default": 0.2, "a": 0.5}, ["a", "b"], ["a", "b"], lambda: [1, 3])
    # Beside one image of a stands 1, beside three of b stand 3/4: 7/4 beside 4.
    assert shares.at(0) == pytest.approx(7 / 23) and shares.at(0).denominator == 23
    assert shares.class_weights() == [0.25, 0.1875]


@pytest.mark.parametrize("scale", [1e-9, 1e12])
def test_class_counts_may_have_any_scale(scale):
    shares = Shares({"default": 0.2, "a": 0.5}, ["a", "b"], ["a", "b"], lambda: [scale, 3 * scale])
    assert shares.at(0) == pytest.approx(7 / 23) and shares.class_weights() == [0.25, 0.1875]


class Unlabelled(IterableDataset):
    def __iter__(self):
        return iter(Images(16))


def test_an_iterable_dataset_has_no_known_frequencies():
    assert class_counts(DataLoader(Unlabelled(), batch_size=8), len(DIGITS)) is None


def test_a_warm_up_does_not_complain_of_small_shares(caplog):
    with caplog.at_level(logging.WARNING, logger="streamaug"):
        list(StreamLoader(real_loader(), FakeStream(), ratios.warmup(0.5, steps=100)))
    assert caplog.text == ""

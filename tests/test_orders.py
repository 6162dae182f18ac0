"""Orders and the planner: random access, class shares, disjoint ids, rows that belong to their labels."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamaug.config import Recipe
from streamaug.errors import DataError
from streamaug.orders import INTERP_LINEAR, INTERP_NONE, OrderBatch, Planner, Schedule, Weights

STEPS = 8
ANGLES = np.linspace(np.pi / 2, 0, STEPS + 1)
SCHEDULE = Schedule(np.cos(ANGLES), np.sin(ANGLES))
RECIPES = [
    Recipe(kind="noise", depth=(0.2, 0.5)),
    Recipe(kind="interpolate", depth=(0.3, 0.9), t=(0.0, 0.5)),
    Recipe(kind="interpolate", mode="spherical", depth=(0.3, 0.9)),
]


def planner(recipes=RECIPES, *, classes=4, rows_per_class=3, batch_size=16, seed=0) -> Planner:
    labels = np.repeat(np.arange(classes), rows_per_class)
    return Planner(labels, classes, SCHEDULE, recipes, batch_size, seed)


@given(seed=st.integers(0, 2**63), k=st.integers(0, 2**40), before=st.lists(st.integers(0, 100), max_size=3))
def test_a_batch_depends_on_seed_k_and_weights_alone(seed, k, before):
    one, other = planner(seed=seed), planner(seed=seed)
    for earlier in before:
        other.batch(earlier, other.uniform())
    a, b = one.batch(k, one.uniform()), other.batch(k, other.uniform())
    assert a.start == b.start
    np.testing.assert_array_equal(a.images, b.images)


@given(k=st.integers(0, 1000))
def test_other_k_and_other_seeds_give_other_batches(k):
    first = planner().batch(k, planner().uniform()).images
    assert not np.array_equal(
        first["t"], planner().batch(k + 1, planner().uniform()).images["t"]
    ) or not np.array_equal(first["row_a"], planner().batch(k + 1, planner().uniform()).images["row_a"])
    assert not np.array_equal(first["row_a"], planner(seed=1).batch(k, planner().uniform()).images["row_a"])


def test_negative_seeds_are_seeds_of_their_own():
    images = [planner(seed=seed).batch(3, planner().uniform()).images for seed in (-1, -2)]
    assert not np.array_equal(images[0]["row_a"], images[1]["row_a"])


@given(ks=st.sets(st.integers(0, 2**50), min_size=2, max_size=5))
def test_ids_of_different_batches_are_disjoint(ks):
    plan = planner()
    ids = np.concatenate([plan.batch(k, plan.uniform()).images["id"] for k in ks])
    assert len(np.unique(ids)) == len(ids)


@given(
    weights=st.lists(st.floats(0, 10), min_size=4, max_size=4).filter(lambda w: sum(w) > 0.1),
    k=st.integers(0, 50),
)
def test_class_shares_are_within_one_image_of_their_weights(weights, k):
    plan = planner()
    counts = np.bincount(plan.batch(k, Weights(0, np.array(weights))).images["label"], minlength=4)
    wanted = np.array(weights) / sum(weights) * 16
    assert (np.abs(counts - wanted) <= 1 + 1e-9).all()


@given(k=st.integers(0, 200))
def test_every_row_belongs_to_its_label_and_partners_differ(k):
    plan = planner()
    images = plan.batch(k, plan.uniform()).images
    assert (plan.row_labels[images["row_a"]] == images["label"]).all()
    paired = images["row_b"] >= 0
    assert (plan.row_labels[images["row_b"][paired]] == images["label"][paired]).all()
    assert (images["row_b"][paired] != images["row_a"][paired]).all()


@given(k=st.integers(0, 100), rows=st.sets(st.integers(0, 11), min_size=4))
def test_rows_of_weight_zero_are_never_ordered(k, rows):
    plan = planner()
    weights = np.zeros(12)
    weights[list(rows)] = 1
    classes = np.zeros(4)
    classes[plan.row_labels[list(rows)]] = 1
    images = plan.batch(k, Weights(1, classes, weights)).images
    used = set(images["row_a"].tolist()) | set(images["row_b"][images["row_b"] >= 0].tolist())
    assert used <= rows


@given(k=st.integers(0, 200))
def test_anchored_weights_follow_the_schedule(k):
    plan = planner(RECIPES[:2])
    order = plan.batch(k, plan.uniform())
    weights = order.images["latent_w"].astype(np.float64)
    np.testing.assert_allclose(weights[:, 0] + weights[:, 1], SCHEDULE.signal[order.start], atol=1e-6)
    np.testing.assert_allclose(weights[:, 2], SCHEDULE.noise[order.start], atol=1e-6)


def test_depths_stay_in_their_range():
    plan = planner([Recipe(kind="noise", depth=(0.25, 0.5))])
    starts = {plan.batch(k, plan.uniform()).start for k in range(200)}
    assert starts == {4, 5, 6}


def test_a_class_with_one_row_falls_back_to_noise():
    plan = planner([RECIPES[1]], rows_per_class=1)
    images = plan.batch(0, plan.uniform()).images
    assert (images["row_b"] == -1).all()
    assert (images["interp"] == INTERP_NONE).all()
    assert (images["t"] == 0).all()


def test_pairs_are_linear_when_asked():
    plan = planner([RECIPES[1]])
    images = plan.batch(0, plan.uniform()).images
    assert (images["interp"] == INTERP_LINEAR).all()
    assert images["t"].max() <= 0.5


def test_prompt_needs_no_rows():
    plan = Planner(np.zeros(0, np.int64), 3, SCHEDULE, [Recipe(kind="prompt")], 8, 0)
    order = plan.batch(5, plan.uniform())
    assert order.start == 0
    assert (order.images["row_a"] == -1).all()
    np.testing.assert_array_equal(order.images["latent_w"], np.tile([0, 0, 1], (8, 1)))


def test_a_class_without_a_row_is_refused_by_number():
    with pytest.raises(DataError, match=r"\[1\]"):
        Planner(np.array([0, 2, 2]), 3, SCHEDULE, RECIPES, 8, 0)


def test_all_weights_zero_is_refused():
    with pytest.raises(DataError, match="every weight is 0"):
        planner().batch(0, Weights(0, np.zeros(4)))


@given(k=st.integers(0, 2**40), judge=st.integers(0, 2**40))
@settings(max_examples=20)
def test_orders_survive_a_trip_through_memory(k, judge):
    plan = planner()
    order = plan.batch(k, plan.uniform(7), judge)
    buffer = bytearray(OrderBatch.nbytes(16) + 8)
    order.write(memoryview(buffer))
    back = OrderBatch.read(memoryview(buffer), 16)
    assert (back.k, back.start, back.plan_version, back.judge_version) == (k, order.start, 7, judge)
    np.testing.assert_array_equal(back.images, order.images)


def test_the_digest_changes_with_what_plans_depend_on():
    digests = {
        planner().digest(),
        planner(seed=1).digest(),
        planner(batch_size=8).digest(),
        planner(RECIPES[:1]).digest(),
        planner(rows_per_class=2).digest(),
    }
    assert len(digests) == 5


def test_equal_weights_of_rows_and_none_order_the_same():
    schedule = Schedule(np.linspace(0, 1, 6), np.linspace(1, 0, 6))
    labels = np.arange(500) % 3
    for kind in ({"kind": "noise"}, {"kind": "interpolate"}, {"kind": "interpolate", "pairs": "mixed"}):
        planner = Planner(labels, 3, schedule, [Recipe.model_validate(kind)], 32, seed=3)
        for k in range(20):
            one, other = (planner.batch(k, Weights(0, np.ones(3), rows)) for rows in (None, np.ones(500)))
            assert one.images.tobytes() == other.images.tobytes()


def test_a_partner_class_without_a_usable_row_is_refused_by_name_of_the_cause():
    schedule = Schedule(np.linspace(0, 1, 6), np.linspace(1, 0, 6))
    planner = Planner(np.arange(4) % 2, 2, schedule, [Recipe(kind="interpolate", pairs="mixed")], 1, seed=0)
    weights = Weights(0, np.ones(2), np.array([1.0, 0.0, 1.0, 0.0]))
    for k in range(10):
        with pytest.raises(DataError, match="every weight is 0"):
            planner.batch(k, weights)

"""Recipes: the algebra of every kind's weights, which rows and classes it takes, and what it does to latents."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamaug.config import Recipe
from streamaug.errors import DataError
from streamaug.orders import (
    INTERP_CIRCLE,
    INTERP_LINEAR,
    INTERP_NONE,
    INTERP_SPHERICAL,
    ORIGINS,
    Planner,
    Schedule,
    Weights,
)
from streamaug.sampling.latents import mix_weights, start_latents
from streamaug.sampling.residence import Rows

CLASSES, ROWS = 4, 6  # rows a class
ANGLES = np.linspace(np.pi / 2, 0, 9)
SCHEDULE = Schedule(np.cos(ANGLES), np.sin(ANGLES))
LABELS = np.repeat(np.arange(CLASSES), ROWS)
NAMES = ["ant", "bee", "cat", "dog"]
# The k-th nearest of a row is the one k places on, round its class.
NEAR = np.stack([LABELS * ROWS + (np.arange(len(LABELS)) + k) % ROWS for k in range(1, ROWS)], 1)

ks = st.integers(0, 500)


def planner(*recipes: Recipe, labels=LABELS, **settings) -> Planner:
    settings = {"class_names": NAMES, "neighbours": NEAR, "inverted_start": 0} | settings
    return Planner(labels, CLASSES, SCHEDULE, recipes, 16, 0, **settings)


def weights_of(images: np.ndarray, name: str) -> np.ndarray:
    return images[name].astype(np.float64)


@given(k=ks)
def test_latent_noise_preserves_the_variance_of_inverted_latents(k):
    order = planner(Recipe(kind="latent_noise", strength=(0.1, 0.9))).batch(k, Weights(0, np.ones(CLASSES)))
    weights = weights_of(order.images, "latent_w")
    assert ORIGINS[order.origin] == "inverted" and order.start == 0
    np.testing.assert_allclose(weights[:, 0] ** 2 + weights[:, 2] ** 2, 1, atol=1e-6)
    assert (weights[:, 1] == 0).all() and (order.images["row_b"] == -1).all()
    assert weights[:, 2].min() >= 0.1 and weights[:, 2].max() <= 0.9


@given(k=ks)
def test_latent_noise_at_half_depth_is_scaled_to_the_latent_there(k):
    schedule = Schedule(np.linspace(0, 3, 9), np.linspace(4, 0, 9))
    plan = Planner(LABELS, CLASSES, schedule, [Recipe(kind="latent_noise")], 8, 0, inverted_start=4)
    order = plan.batch(k, plan.uniform())
    weights = weights_of(order.images, "latent_w")
    assert order.start == 4
    np.testing.assert_allclose(weights[:, 0] ** 2 + (weights[:, 2] / np.hypot(1.5, 2.0)) ** 2, 1, atol=1e-6)


@given(k=ks)
def test_embedding_mixes_conditioning_and_starts_from_fresh_noise(k):
    order = planner(Recipe(kind="embedding", alpha=(0, 0.4), lambd=(0.1, 0.3))).batch(k, Weights(0, np.ones(CLASSES)))
    images = order.images
    cond = weights_of(images, "cond_w")
    np.testing.assert_allclose(cond[:, 0] + cond[:, 1], 1, atol=1e-6)
    assert cond[:, 1].max() <= 0.4 and cond[:, 2].min() >= 0.1 and cond[:, 2].max() <= 0.3
    np.testing.assert_array_equal(images["latent_w"], np.tile([0, 0, 1], (16, 1)))
    assert order.start == 0 and (images["template"] == -1).all()
    assert (LABELS[images["row_b"]] == images["label"]).all() and (images["row_a"] != images["row_b"]).all()


def test_an_image_alone_in_its_class_keeps_its_own_embedding():
    plan = planner(Recipe(kind="embedding", alpha=(0.4, 0.4)), labels=np.arange(CLASSES), neighbours=None)
    images = plan.batch(0, plan.uniform()).images
    assert (images["row_b"] == -1).all()
    np.testing.assert_allclose(images["cond_w"][:, :2], np.tile([1, 0], (16, 1)))


@given(k=ks, mode=st.sampled_from(["linear", "spherical"]), latents=st.sampled_from(["image", "inverted"]))
def test_mixed_pairs_are_of_two_classes_and_say_so_in_the_label(k, mode, latents):
    plan = planner(Recipe(kind="interpolate", pairs="mixed", mode=mode, latents=latents, t=(0.1, 0.5)))
    order = plan.batch(k, plan.uniform())
    images = order.images
    assert (images["label_b"] != images["label"]).all()
    assert (LABELS[images["row_b"]] == images["label_b"]).all() and (LABELS[images["row_a"]] == images["label"]).all()
    np.testing.assert_array_equal(images["label_mix"], images["t"])
    assert images["t"].min() >= 0.1 and images["t"].max() <= 0.5
    signal = 1.0 if latents == "inverted" else SCHEDULE.signal[order.start]
    if mode == "linear":
        np.testing.assert_allclose(images["latent_w"][:, 1], signal * images["t"], rtol=1e-6)


@given(k=ks)
def test_mixed_partners_come_only_from_classes_that_are_ordered(k):
    plan = planner(Recipe(kind="interpolate", pairs="mixed"))
    images = plan.batch(k, Weights(0, np.array([1.0, 0.0, 2.0, 0.0]))).images
    assert set(images["label_b"]) | set(images["label"]) <= {0, 2}
    alone = plan.batch(k, Weights(0, np.array([0.0, 1.0, 0.0, 0.0]))).images
    assert (alone["row_b"] == -1).all() and (alone["label_mix"] == 0).all() and (alone["interp"] == INTERP_NONE).all()


@given(k=ks, count=st.integers(1, ROWS), kind=st.sampled_from(["interpolate", "embedding"]))
def test_nearest_partners_are_among_the_nearest(k, count, kind):
    plan = planner(Recipe(kind=kind, pairs="nearest", neighbours=count))
    images = plan.batch(k, plan.uniform()).images
    for a, b in zip(images["row_a"], images["row_b"], strict=True):
        assert b in NEAR[a, :count]


@given(k=ks, used=st.sets(st.integers(0, ROWS - 1), min_size=1))
def test_nearest_partners_have_weight(k, used):
    rows = np.zeros(len(LABELS))
    for label in range(CLASSES):
        rows[[label * ROWS + row for row in used]] = 1
    plan = planner(Recipe(kind="interpolate", pairs="nearest", neighbours=2))
    images = plan.batch(k, Weights(0, np.ones(CLASSES), rows)).images
    partners = images["row_b"]
    assert rows[partners[partners >= 0]].all()
    assert (partners >= 0).all() == (len(used) > 1)


def test_nearest_partners_without_a_table_are_refused():
    with pytest.raises(DataError, match="neighbours"):
        planner(Recipe(kind="interpolate", pairs="nearest"), neighbours=None)


def test_circle_goes_all_the_way_round():
    plan = planner(Recipe(kind="interpolate", latents="inverted", mode="circle", t=(0, 1)))
    images = np.concatenate([plan.batch(k, plan.uniform()).images for k in range(40)])
    assert (images["interp"] == INTERP_CIRCLE).all()
    assert images["t"].min() < 0.05 and images["t"].max() > 0.95
    np.testing.assert_array_equal(images["latent_w"], np.tile([1, 0, 0], (len(images), 1)))


def test_inverted_latents_without_a_partner_are_varied_by_noise():
    plan = planner(Recipe(kind="interpolate", latents="inverted"), labels=np.arange(CLASSES), neighbours=None)
    weights = weights_of(plan.batch(0, plan.uniform()).images, "latent_w")
    assert (weights[:, 2] >= 0.1).all()
    np.testing.assert_allclose((weights**2).sum(1), 1, atol=1e-6)


def test_recipes_for_some_classes_leave_every_class_its_share():
    recipes = [
        Recipe(kind="noise", weight=1),
        Recipe(kind="interpolate", weight=3, classes=["bee", "dog"], mode="linear"),
    ]
    plan, classes = planner(*recipes), np.array([1.0, 1.0, 2.0, 4.0])
    counts = {0: np.zeros(CLASSES), 1: np.zeros(CLASSES)}
    for k in range(3000):
        images = plan.batch(k, Weights(0, classes)).images
        linear = int((images["interp"] == INTERP_LINEAR).any())
        counts[linear] += np.bincount(images["label"], minlength=CLASSES)
    total = counts[0] + counts[1]
    np.testing.assert_allclose(total / total.sum(), classes / classes.sum(), atol=0.02)
    np.testing.assert_allclose(counts[1] / total, [0, 0.75, 0, 0.75], atol=0.02)


def test_a_recipe_for_an_unknown_class_is_refused_by_name():
    with pytest.raises(DataError, match="for class 'cow'"):
        planner(Recipe(kind="noise"), Recipe(kind="noise", classes=["cow"]))
    with pytest.raises(DataError, match="no recipe is for class ant, bee"):
        planner(Recipe(kind="noise", classes=["cat", "dog"]))


class Bank:
    """Rows of unit Gaussian noise, as inverted latents are."""

    def __init__(self, rows: int, shape: tuple[int, ...]):
        self.values = torch.randn(rows, *shape, generator=torch.Generator().manual_seed(0))

    def gather(self, name: str, rows) -> torch.Tensor:
        assert name == "inverted"
        return self.values[torch.as_tensor(rows)]


def latents_of(recipe: Recipe, shape=(4, 16, 16)) -> tuple[torch.Tensor, np.ndarray]:
    plan, bank = planner(recipe), Bank(len(LABELS), shape)
    order = plan.batch(0, plan.uniform())
    return start_latents(Rows(bank, torch.device("cpu")), order, shape, seed=0, kernels="auto"), order.images


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(kind="latent_noise", strength=(0.5, 0.5)),
        Recipe(kind="interpolate", latents="inverted", mode="spherical", t=(0.5, 0.5)),
        Recipe(kind="interpolate", latents="inverted", mode="circle", t=(0, 1)),
    ],
    ids=["latent_noise", "spherical", "circle"],
)
def test_what_should_keep_the_norm_of_noise_does(recipe):
    latents, _ = latents_of(recipe)
    assert torch.allclose(latents.flatten(1).std(1), torch.ones(16), atol=0.1)


def test_linear_interpolation_shrinks_noise_as_it_must():
    latents, _ = latents_of(Recipe(kind="interpolate", latents="inverted", mode="linear", t=(0.5, 0.5)))
    assert torch.allclose(latents.flatten(1).std(1), torch.full((16,), 0.5**0.5), atol=0.07)


@pytest.mark.parametrize("interp", [INTERP_SPHERICAL, INTERP_CIRCLE])
def test_angles_are_those_of_float64(interp):
    recipe = Recipe(
        kind="interpolate", latents="inverted", mode="spherical" if interp == INTERP_SPHERICAL else "circle"
    )
    plan, bank = planner(recipe), Bank(len(LABELS), (1, 4, 4))
    images = plan.batch(0, plan.uniform()).images
    a, b = torch.from_numpy(images["row_a"].copy()), torch.from_numpy(images["row_b"].copy())
    found = mix_weights(images, bank.values, a, b)
    for position, image in enumerate(images):
        x, y = (bank.values[image[name]].double().flatten().numpy() for name in ("row_a", "row_b"))
        theta, t = np.arccos(x @ y / np.linalg.norm(x) / np.linalg.norm(y)), float(image["t"])
        turn = 2 * np.pi * t if interp == INTERP_CIRCLE else None
        wanted = (
            (np.sin((1 - t) * theta), np.sin(t * theta)) if turn is None else (np.sin(theta + turn), -np.sin(turn))
        ) / np.sin(theta)
        np.testing.assert_allclose(found[position, :2], wanted, rtol=1e-5, atol=1e-6)

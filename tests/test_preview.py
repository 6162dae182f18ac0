"""Previewing a recipe: strengths that grow, anchors that stay, pictures that can be looked at."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from streamaug.config import Recipe, load
from streamaug.demo.survival import as_markdown, survival
from streamaug.errors import UsageError
from streamaug.preparation import Prepared, prepare
from streamaug.preview import draw_recipe, engine_of
from streamaug.progress import Silent
from streamaug.sweep import anchors, at_strength, find_recipe, strength_of, sweep

SMALL = [
    "prior.steps=2",
    "prior.channels=[8, 16]",
    "judge.steps=2",
    "judge.features=false",
    "judge.min_score=0",
    "model.compile=false",
    "data.shots=2",
    "bank.methods=[encode, ddim]",
    "bank.ddim.iterations=1",
]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return load("digits", [*SMALL, f"cache={tmp_path_factory.mktemp('cache')}"])


@pytest.fixture(scope="module")
def prepared(settings) -> Prepared:
    return prepare(settings)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(kind="noise"),
        Recipe(kind="latent_noise"),
        Recipe(kind="interpolate"),
        Recipe(kind="interpolate", latents="inverted", mode="spherical"),
    ],
    ids=["noise", "latent_noise", "interpolate", "inverted"],
)
def test_a_sweep_keeps_anchors_and_noise_and_moves_further_from_them(prepared, recipe):
    engine = engine_of(prepared)
    _, amounts = strength_of(recipe, prepared.planner.schedule)
    swept = sweep(prepared, engine, recipe, amounts, size=10)
    assert [each.amount for each in swept] == sorted(amounts)
    for each in swept[1:]:
        np.testing.assert_array_equal(each.rows, swept[0].rows)
        np.testing.assert_array_equal(each.labels, swept[0].labels)
    back = anchors(prepared, engine, recipe, swept[0].rows)
    distance = [np.abs(each.images.astype(float) - back).mean() for each in swept]
    assert distance[0] < distance[-1]


def test_a_pixel_row_gives_its_image_back(prepared):
    rows = np.arange(8)
    back = anchors(prepared, engine_of(prepared), Recipe(kind="noise"), rows)
    np.testing.assert_array_equal(back, prepared.labelled.images[rows])


@pytest.mark.parametrize("name", ["0", "noise", "interpolate"])
def test_the_picture_of_a_recipe_is_a_png(settings, tmp_path: Path, name):
    made = draw_recipe(settings, tmp_path / "recipe.png", name, Silent())
    assert made >= 50
    assert Image.open(tmp_path / "recipe.png").size[0] > 1000


@pytest.mark.parametrize(("name", "message"), [("7", "recipes 0 to 0"), ("nose", "expected a recipe's position")])
def test_a_recipe_there_is_not_is_refused(settings, name, message):
    with pytest.raises(UsageError, match=message):
        find_recipe(settings.recipes, name)


def test_a_recipe_that_training_leaves_out_can_be_looked_at(settings, tmp_path: Path):
    recipes = [Recipe(kind="noise"), Recipe(kind="interpolate", weight=0)]
    drawn = draw_recipe(settings.model_copy(update={"recipes": recipes}), tmp_path / "out.png", "1", Silent())
    assert drawn > 0 and (tmp_path / "out.png").stat().st_size > 0


def test_one_strength_leaves_no_range_open():
    recipe = at_strength(Recipe(kind="embedding", alpha=(0, 1), guidance=(1, 3), classes=["a"]), 0.2)
    assert recipe.alpha == recipe.lambd == (0.2, 0.2) and recipe.guidance == (2.0, 2.0) and recipe.classes is None


def test_survival_counts_right_labels_of_all_images_and_of_accepted_ones(prepared):
    found = survival(prepared, ["noise"], images=64, steps=3)
    rows = found["tables"][0]["rows"]
    assert [row["depth"] for row in rows] == sorted(row["depth"] for row in rows)
    assert all(0 <= row["survives"] <= 1 and 0 <= row["accepted"] <= 1 and row["images"] == 64 for row in rows)
    assert "| noise: depth | label survives |" in as_markdown(found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nosuch"], "no such file"), (["digits", "--recipe", "embedding"], "bank.methods [encode] does not write")],
)
def test_survival_says_what_cannot_be_used_in_one_line(tmp_path, arguments, message):
    command = [sys.executable, "-m", "streamaug.demo.survival", *arguments, "--set", f"cache={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []

"""Held-out shares: every class on both sides, exact counts, and refusals that say what fits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamaug.data import ImageSet, load_splits
from streamaug.data.divide import divide
from streamaug.errors import DataError

from .pictures import folder_config, make_folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"holdout": 500}, r"data.holdout: 500 means 500 of 12 images.*2 to 10"),
        ({"holdout": 0.05}, r"data.holdout: 0.05 means 1 of 12 images"),
        ({"holdout": 2.5}, r"2.5 is neither a count nor a fraction"),
        ({"holdout": 0, "validation": 297}, r"data.validation: 297 means 297 of 12"),
    ],
)
def test_a_share_that_leaves_a_class_empty_is_refused_with_what_fits(tmp_path, changes, message):
    root = make_folder(tmp_path / "data", {"a": 6, "b": 6})
    with pytest.raises(DataError, match=message):
        load_splits(folder_config(root, **changes))


def test_a_class_of_one_image_cannot_be_divided(tmp_path):
    root = make_folder(tmp_path / "data", {"a": 6, "b": 1})
    with pytest.raises(DataError, match=r"class 'b' has too few images"):
        load_splits(folder_config(root))


@settings(deadline=None, max_examples=60)
@given(
    counts=st.lists(st.integers(2, 30), min_size=1, max_size=6),
    share=st.floats(0.01, 0.99),
    seed=st.integers(-5, 5),
    data=st.data(),
)
def test_every_division_is_disjoint_complete_and_has_every_class_on_both_sides(counts, share, seed, data):

    labels = np.repeat(np.arange(len(counts)), counts)
    images = ImageSet.from_arrays(
        np.zeros((len(labels), 1, 1, 1), np.uint8), labels, [f"c{i}" for i in range(len(counts))]
    )
    as_count = data.draw(st.booleans())
    wanted = round(share * len(labels))
    amount = wanted if as_count else share
    if not len(counts) <= wanted <= len(labels) - len(counts):
        if wanted or not as_count:
            with pytest.raises(DataError):
                divide(images, amount, "holdout", seed)
        return
    held, rest = divide(images, amount, "holdout", seed)
    assert sorted(held.sources + rest.sources) == sorted(images.sources)
    assert len(held) == wanted and held.class_counts().min() >= 1 and rest.class_counts().min() >= 1

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamaug.errors import UsageError
from streamaug.loader.interleave import Share, deferred_length, deferred_split, exact, image_seeds, places

ratios = st.floats(0.0, 0.99).map(lambda value: round(value, 6))
sizes = st.lists(st.integers(0, 200), max_size=60)


@given(ratios, sizes)
def test_replace_delivers_the_ratio_within_one_image_after_any_number_of_batches(ratio, totals):
    share, synthetic, delivered = Share(), 0, 0
    for total in totals:
        planned = share.of_total(total, exact(ratio))
        assert 0 <= planned <= total
        synthetic, delivered = synthetic + planned, delivered + total
        assert abs(synthetic - exact(ratio) * delivered) < 1


@given(ratios, sizes)
def test_append_delivers_the_ratio_within_one_image_after_any_number_of_batches(ratio, reals):
    share, synthetic, delivered = Share(), 0, 0
    for real in reals:
        planned = share.beside(real, exact(ratio))
        assert planned >= 0
        synthetic, delivered = synthetic + planned, delivered + real + planned
        assert abs(synthetic - exact(ratio) * delivered) < 1


@given(st.lists(st.tuples(ratios, st.integers(1, 100)), max_size=60), st.booleans())
def test_a_ratio_that_changes_delivers_the_sum_of_what_was_asked_within_one_image(steps, appended):
    share, error = Share(), Fraction()
    for ratio, count in steps:
        planned = share.beside(count, exact(ratio)) if appended else share.of_total(count, exact(ratio))
        delivered = count + planned if appended else count
        error += planned - exact(ratio) * delivered
        assert planned >= 0
        assert abs(error) < 1
        assert share.debt == -error


@given(st.integers(0, 300), st.integers(1, 40), ratios, st.integers(-50, 50))
def test_defer_delivers_every_real_image_in_the_number_of_batches_it_said(rows, size, ratio, hundredths):
    debt, ratio = Fraction(hundredths, 100), min(exact(ratio), Fraction(9, 10))
    share, left, batches = Share(debt), rows, 0
    while left > 0:
        real, synthetic = deferred_split(share, size, left if left < size else None, ratio)
        assert 0 <= real <= left and synthetic >= 0
        left -= real
        batches += 1
    assert batches == deferred_length(rows, size, debt, lambda step: ratio, step=0)


def test_a_ratio_is_the_decimal_fraction_it_was_written_as():
    assert exact(0.3) == Fraction(3, 10)
    assert exact(np.float32(0.25)) == Fraction(1, 4)
    share = Share()
    assert [share.of_total(1, exact(0.1)) for _ in range(20)].count(1) == 2


@pytest.mark.parametrize("ratio", [1, 1.0, -0.1, float("nan"), "half", None])
def test_a_ratio_outside_its_range_is_refused(ratio):
    with pytest.raises(UsageError, match=r"\[0, 1\)"):
        exact(ratio)


def test_places_depend_on_their_key_alone_and_are_distinct():
    first = places((7, 0, 3), 64, 32)
    np.random.default_rng().random(5)
    assert (places((7, 0, 3), 64, 32) == first).all()
    assert len(set(first.tolist())) == 32
    assert (places((7, 0, 4), 64, 32) != first).any()
    assert len(set(image_seeds((7, 0, 3), 32))) == 32

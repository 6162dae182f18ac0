"""Tuning is fair: as many trials for one arm as for the other, on draws that no report uses."""

import pytest

from streamaug.config import load
from streamaug.demo.run import FULL_SEEDS, LabelledDraws
from streamaug.demo.tune import FIRST_SEED, REAL_ONLY_TRIALS, SHARED_TRIALS, STREAM_TRIALS, _with


def test_both_arms_get_the_same_number_of_trials():
    assert len(REAL_ONLY_TRIALS) == len(STREAM_TRIALS)


@pytest.mark.parametrize("trial", [*SHARED_TRIALS, *REAL_ONLY_TRIALS, *STREAM_TRIALS], ids=" ".join)
def test_every_trial_changes_the_configuration_it_is_tried_on(trial):
    config = load("digits")
    elsewhere = ["recipes=[{kind: prompt}]", "demo.real_only={lr: 7}", "train.classifier=none", "judge={}"]
    reset = _with(config, elsewhere)
    assert _with(reset, trial) != reset


def test_tuning_and_reports_draw_by_different_seeds():
    config = load("digits")
    assert config.seed + FULL_SEEDS < FIRST_SEED


def test_the_draws_of_a_seed_do_not_depend_on_the_others():
    config = load("digits")
    alone, among = LabelledDraws.of(config, [2]), LabelledDraws.of(config, [0, 1, 2])
    assert alone.of_seed(0).hashes == among.of_seed(2).hashes
    assert among.row_weights(2).sum() == 30
    assert len(alone.of_seed(0)) == 30

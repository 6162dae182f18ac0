"""The chaos that users can run: it passes here, and it would notice."""

import os
import subprocess
import sys
import time
from collections import Counter

import pytest

from streamaug.stream import torture as module
from streamaug.stream.torture import Report, main, torture


def test_seconds_of_chaos_deliver_the_same_images_and_leave_nothing():
    command = [sys.executable, "-m", module.__name__, "--minutes", "0.12", "--producers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert done.stdout.startswith("seed ") and "2 producers, 0.12 minutes" in done.stdout
    assert "verdict: every image as in the undisturbed run, and nothing left behind" in done.stdout


def test_images_that_depend_on_the_process_are_noticed():
    report = torture(0.01, seed=3, producers=1, options={"unfaithful": True}, round_seconds=0.5, say=lambda line: None)
    assert "step 0 delivered ids" in report.failures[0]
    assert report.verdict().endswith("verdict: FAILED")


def test_what_is_left_behind_is_noticed(monkeypatch):
    kept = []

    def play_and_keep(*arguments):
        play(*arguments)
        kept.append(os.open(os.devnull, os.O_RDONLY))

    play = module._play
    monkeypatch.setattr(module, "_play", play_and_keep)
    monkeypatch.setattr(module, "GONE_SECONDS", 2.0)
    report = torture(0.01, seed=3, producers=1, round_seconds=0.5, say=lambda line: None)
    os.close(kept[0])
    assert "left something behind" in report.failures[0] and "descriptors" in report.failures[0]


def test_ctrl_c_ends_it_with_a_verdict_on_the_rounds_before(monkeypatch):
    def play_then_interrupt(run, producers, until_seconds, report, say):
        if report.rounds:
            raise KeyboardInterrupt
        play(run, producers, time.monotonic() + 0.3, report, say)

    play = module._play
    monkeypatch.setattr(module, "_play", play_then_interrupt)
    report = torture(1, seed=3, producers=1, say=lambda line: None)
    verdict = report.verdict()
    assert report.exit_code == 130 and verdict.startswith("1 round, ")
    assert "Interrupted: only whole rounds count." in verdict and "verdict: every image as" in verdict
    report.failures.append("round 0: an image differs")
    assert report.exit_code == 1 and report.verdict().endswith("verdict: FAILED")


def test_the_verdict_says_what_was_not_done_and_nothing_of_nothing():
    verdict = Report(rounds=2, images=40, done=Counter({"producer killed": 3, "fork": 1})).verdict()
    assert "2 rounds, 40 images. What was done: producer killed 3, fork 1." in verdict
    assert "What so short a time left out: producer terminated, producer stopped, producer raised, trainer" in verdict
    assert "left out" not in Report(rounds=2, images=40, done=Counter(module.DEEDS)).verdict()
    assert Report(interrupted=True).verdict().endswith("verdict: none, no round was ended")


def test_what_is_done_has_a_name_in_the_verdict():
    assert set(module.Trainer.ACTIONS) < set(module.DEEDS)


@pytest.mark.parametrize(
    "arguments",
    [["--minutes", "soon"], ["--rounds", "3"], *(["--minutes", m] for m in ("0", "-1", "nan")), ["--producers=-1"]],
)
def test_what_it_does_not_understand_it_refuses(arguments):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2

"""The chaos that users can run: it passes here, and it would notice."""

import os
import subprocess
import sys

import pytest

from streamaug.stream import torture as module
from streamaug.stream.torture import main, torture


def test_seconds_of_chaos_deliver_the_same_images_and_leave_nothing():
    command = [sys.executable, "-m", module.__name__, "--minutes", "0.12", "--producers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
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
    monkeypatch.setattr(module, "GONE_SECONDS", 0.5)
    report = torture(0.01, seed=3, producers=1, round_seconds=0.5, say=lambda line: None)
    os.close(kept[0])
    assert "left something behind" in report.failures[0] and "descriptors" in report.failures[0]


@pytest.mark.parametrize("arguments", [["--minutes", "soon"], ["--rounds", "3"]])
def test_what_it_does_not_understand_it_refuses(arguments):
    with pytest.raises(SystemExit):
        main(arguments)

"""Interruption: killed at any moment and started again, the bank is the undisturbed one, byte for byte."""

import os
import random
import signal
import subprocess
import sys
import textwrap
from contextlib import suppress
from pathlib import Path

import pytest

from streamaug.bank import files

from .banks import contents, write


class Crash(BaseException):
    """The process ends here."""


def test_a_crash_at_every_file_operation_leaves_the_same_bank(expected, tmp_path, monkeypatch):
    plan, uninterrupted, _ = expected
    left = 0  # file operations until the crash

    def crashing(operation):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                raise Crash
            return operation(*args, **kwargs)

        return call

    monkeypatch.setattr(os, "fsync", crashing(lambda fd: None))
    for name in ("replace", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, crashing(getattr(os, name)))
    for moment in range(1000):
        path = tmp_path / str(moment)
        left, finished = moment, False
        with suppress(Crash):
            write(path, plan)
            finished = True
        left = 1000
        if not finished:
            (path / files.WORK / "writing").write_bytes(b"half of a fi")
        write(path, plan)
        assert contents(path) == uninterrupted, f"after a crash at operation {moment}"
        if finished:
            break
    assert moment > 120  # 13 groups, 15 checkpoints, 9 shards, rows and index: three operations each, and the cleaning


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.matrix)])
def test_a_bank_killed_at_random_moments_is_byte_identical(expected, tmp_path, kills):
    plan, uninterrupted, _ = expected
    path = tmp_path / "bank"
    # The alarm ends the process as SIGKILL does. It is set there, so that a wait of ours gives it no more time: it
    # takes 0.098 s and more to make 49 seeds.
    script = textwrap.dedent(f"""
        import signal, sys, time
        sys.path.insert(0, {str(Path(__file__).parents[1])!r})
        from bank import banks
        plan = banks.make_plan()
        seed = banks._seed
        banks._seed = lambda *of: (time.sleep(0.002), seed(*of))[1]
        signal.setitimer(signal.ITIMER_REAL, float(sys.argv[1]))
        banks.write(banks.Path({str(path)!r}), plan)
        time.sleep(60)
    """)
    rng = random.Random(kills)
    unfinished = 0
    for _ in range(kills):
        seconds = str(rng.uniform(1e-4, 0.25 / kills))
        ended = subprocess.run([sys.executable, "-c", script, seconds], capture_output=True, text=True, timeout=110)
        assert ended.returncode == -signal.SIGALRM, ended.stderr
        unfinished += not (path / files.INDEX).exists()
    assert unfinished > 0
    write(path, plan)
    assert contents(path) == uninterrupted

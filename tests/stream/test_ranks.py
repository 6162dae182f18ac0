"""Whose orders a stream makes: the rank that is given, or that of torch's process group."""

import multiprocessing
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from streamaug.config import load
from streamaug.errors import UsageError
from streamaug.preparation import _turn
from streamaug.stream.ranks import own_rank


def test_without_a_process_group_there_is_one_rank():
    assert own_rank(None, None) == (0, 1)


def test_the_rank_is_that_of_the_process_group(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 2)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    assert own_rank(None, None) == (2, 3)
    assert own_rank(0, 1) == (0, 1), "what is given counts"


@pytest.mark.parametrize(("rank", "world_size"), [(2, 2), (-1, 2), (0, None), (None, 2)])
def test_a_rank_that_cannot_be_is_refused(rank, world_size):
    with pytest.raises(UsageError, match="rank"):
        own_rank(rank, world_size)


def prepare_slowly(cache: Path, log: Path) -> None:
    with _turn(load("digits", [f"cache={cache}"])):
        for word in ("begin", "end"):
            with open(log, "a") as file:
                file.write(f"{word}\n")
            time.sleep(0.2)


def test_processes_that_prepare_the_same_take_turns(tmp_path):
    fork = multiprocessing.get_context("fork")  # what they import is here already
    processes = [fork.Process(target=prepare_slowly, args=(tmp_path / "cache", tmp_path / "log")) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert (tmp_path / "log").read_text().split() == ["begin", "end"] * 3


def test_a_cache_that_cannot_be_written_is_no_hindrance():
    with _turn(load("digits", ["cache=/proc/nothing"])):
        pass

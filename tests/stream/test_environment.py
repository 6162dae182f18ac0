"""What a producer finds when it starts: seeds, threads, and variables that libraries read when they are imported."""

import os
from pathlib import Path

import numpy as np
import pytest

from streamaug.stream.producers.backends import Work

from .fakes import listed, make_stream, producers_of


def variables(stream) -> dict[str, str]:
    (pid,) = producers_of(stream)
    pairs = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if pair)


def drawn(**options) -> np.ndarray:
    with make_stream(engine=f"{__package__}.drawing:build", **options) as stream:
        return stream.take(8).images.copy()


@pytest.fixture(scope="module")
def first() -> np.ndarray:
    return drawn(start_method="spawn")


def test_every_library_is_seeded_by_the_runs_seed_also_one_that_building_imports(first):
    other = drawn(seed=1, start_method="spawn")
    names = ("random", "numpy", "torch", "hash")
    pixels = first[0].reshape(-1, 16)
    for at, name in enumerate(names):
        assert len(set(pixels[at])) > 1, name
        assert (pixels[at] != other[0].reshape(-1, 16)[at]).any(), name


def test_every_library_draws_the_same_however_the_producer_started_and_in_one_that_replaces_another(first, monkeypatch):
    monkeypatch.setenv("STREAMAUG_FAULT", "before_publish:0")
    assert (drawn(start_method="forkserver") == first).all()


def test_threads_are_set_before_the_libraries_are_imported(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    with make_stream(threads=2) as stream:
        stream.take(1)
        found = variables(stream)
    assert [found[f"{name}_NUM_THREADS"] for name in ("OMP", "MKL", "OPENBLAS")] == ["2", "2", "2"]
    assert os.environ["OMP_NUM_THREADS"] == "7"


def test_a_producer_on_the_cpu_sees_no_gpu_whatever_the_trainer_sees(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with make_stream() as stream:
        stream.take(1)
        assert variables(stream)["CUDA_VISIBLE_DEVICES"] == ""
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"


def test_what_the_work_names_is_set_and_the_rest_is_the_trainers(monkeypatch):
    monkeypatch.setenv("SOMETHING", "of the trainer")
    stream = make_stream()
    work = stream._fleet.work
    object.__setattr__(stream._fleet, "work", Work(**(vars(work) | {"environment": {"CUDA_VISIBLE_DEVICES": "1"}})))
    with stream:
        stream.take(1)
        found = variables(stream)
    assert (found["SOMETHING"], found["CUDA_VISIBLE_DEVICES"]) == ("of the trainer", "1")


def test_a_seed_of_more_than_32_bits_will_do():
    with make_stream(seed=2**40 + 7) as stream:
        assert len(listed(stream, [8])) == 8


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_niceness_is_that_of_the_process_and_of_its_session(method):
    groups: list[str] = []
    while not all(group.endswith("nice 7\n") for group in groups[-2:]) or not groups:
        assert len(groups) < 6, "the system allows few such changes a second, whoever makes them"
        with make_stream(nice=7, producers=2, start_method=method) as stream:
            stream.take(20)
            for pid in producers_of(stream, 2):
                assert os.getpriority(os.PRIO_PROCESS, pid) == min(os.getpriority(os.PRIO_PROCESS, 0) + 7, 19)
                group = Path(f"/proc/{pid}/autogroup")  # Linux shares a core among sessions first
                groups.append(group.read_text() if group.exists() else "nice 7\n")
    assert not Path("/proc/self/autogroup").exists() or " nice 7" not in Path("/proc/self/autogroup").read_text()

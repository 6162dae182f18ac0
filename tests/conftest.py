"""Shared by all tests: a small generator on disk, and nothing of the user's own cache."""

import logging
import os
import signal
from pathlib import Path

import hypothesis
import pytest
import torch

# A machine that stalls has no slow examples, and which examples are drawn is no matter of chance. Others are looked for
# by `--hypothesis-profile default --hypothesis-seed random`.
hypothesis.settings.register_profile(
    "anywhere", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("anywhere")

# Before anything imports Triton: without a GPU its kernels are interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Two test processes with two threads each ruin one another on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What the user or a CI service says about the terminal is not that of the tests: a colour within an option's name, a
# message in lines of 30 characters.
for _name in (
    *("GITHUB_ACTIONS", "FORCE_COLOR", "PY_COLORS", "NO_COLOR", "COLUMNS", "LINES", "TERMINAL_WIDTH"),
    *("TTY_COMPATIBLE", "TTY_INTERACTIVE", "TYPER_USE_RICH", "STREAMAUG_DEBUG"),
):
    os.environ.pop(_name, None)

# Under nohup, or in the background of a script, signals are ignored, and children inherit that.
for _name, _handler in (
    ("SIGINT", signal.default_int_handler),
    ("SIGTERM", signal.SIG_DFL),
    ("SIGHUP", signal.SIG_DFL),
):
    _number = getattr(signal, _name, None)
    if _number is not None and signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, _handler)


# Files that take half a minute and more. They go first, so that with `-n 2` both processes end at about the same time.
_LONG = (
    "tests/test_end_to_end.py",
    "tests/test_bench_gpu.py",
    "tests/inversion/test_kills.py",
    "tests/test_examples.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(_LONG))


@pytest.fixture(autouse=True)
def _log_as_it_was():
    """The command line sets the log's level and handlers for its process, which here is that of the next tests too."""
    log = logging.getLogger("streamaug")
    level, handlers, propagate = log.level, log.handlers[:], log.propagate
    yield
    log.setLevel(level)
    log.handlers[:], log.propagate = handlers, propagate


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """A cache folder of the whole test run: the small prior in it is trained once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def small_overrides(cache) -> list[str]:
    """`--set` values that make the digits configuration quick: a barely trained prior of 30 steps."""
    return [
        f"cache={cache}",
        "prior.steps=30",
        "prior.channels=[16, 32]",
        "model.steps=4",
        "model.compile=false",
        "judge.steps=60",
        "stream.batch_size=16",
        "train.steps=12",
        "train.batch_size=16",
        "recipes=[{kind: noise, depth: [0.25, 0.5]}]",
    ]

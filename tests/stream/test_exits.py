"""However a trainer ends, no producer outlives it, no memory stays behind, and its exit code is its own."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import segments

from streamaug.errors import StreamaugError, UsageError
from streamaug.stream.footprint import footprint

from . import fakes
from .fakes import assert_given_back, assert_within, listed, make_stream, producers_of, running, undisturbed, until

PRELUDE = f"""
import gc, os, signal, sys, time
from {fakes.__name__} import make_stream, producers_of

def run(**options):
    stream = make_stream(**options)
    stream.take(8)
    print(*producers_of(stream, options.get("backend") != "local"), flush=True)
    return stream
"""

# name: (script, exit code, last line of stderr)
ENDINGS = {
    "closed": ("run().close()", 0, ""),
    "not closed": ("stream = run()", 0, ""),
    "break": ("stream = run()\nwhile True:\n    stream.take(1)\n    break", 0, ""),
    "garbage": ("stream = run(); del stream; gc.collect()\ntime.sleep(0.2); print('on', flush=True)", 0, ""),
    "exception": ("stream = run()\nraise ValueError('mine')", 1, "ValueError: mine"),
    "sys.exit": ("stream = run()\nsys.exit(7)", 7, ""),
    "os._exit": ("stream = run()\nos._exit(5)", 5, ""),
    "held in a cycle": ("stream = run(); me = [stream]; me.append(me)", 0, ""),
    "in a thread": (
        "import threading\nkept = []\nt = threading.Thread(target=lambda: kept.append(run()))\n"
        "t.start(); t.join(); kept[0].take(50)",
        0,
        "",
    ),
    "local": ("stream = run(backend='local'); stream.take(1)", 0, ""),
    "local at work": (
        "stream = run(backend='local', engine_options={'seconds': 0.05}); stream.take(1)",
        0,
        "",
    ),
}


def script(body: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + body],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def pids_of(process: subprocess.Popen) -> list[int]:
    return [int(pid) for pid in process.stdout.readline().split()]


def assert_gone(pids: list[int]) -> None:
    until(lambda: not any(running(pid) for pid in pids), 2)


@pytest.fixture(autouse=True)
def nothing_left_in_shared_memory():
    before = segments.names()
    yield
    assert not segments.left_behind(before)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_trainer_that_ends_this_way_leaves_nothing_and_keeps_its_exit_code(ending):
    body, code, last_line = ENDINGS[ending]
    process = script(body)
    pids = pids_of(process)
    _, errors = process.communicate(timeout=100)
    assert_gone(pids)
    assert process.returncode == code, errors
    assert errors.strip().splitlines()[-1:] == ([last_line] if last_line else []), errors
    assert len(pids) == (0 if "local" in ending else 1)


@pytest.mark.parametrize(
    ("signum", "tail"), [(signal.SIGINT, "KeyboardInterrupt"), (signal.SIGTERM, ""), (signal.SIGKILL, "")]
)
@pytest.mark.parametrize("doing", ["time.sleep(60)", "stream.take(10**6)"])
def test_a_trainer_that_gets_a_signal_leaves_nothing(signum, tail, doing):
    process = script(f"stream = run(engine_options={{'seconds': 0.02}})\n{doing}")
    pids = pids_of(process)
    time.sleep(0.2)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=100)
    assert_gone(pids)
    assert process.returncode == -signum
    assert errors.strip().splitlines()[-1:] == ([tail] if tail else []), errors
    assert errors.count("Traceback") == bool(tail)


def test_a_trainer_killed_while_its_producers_start_leaves_nothing():
    process = script(
        "stream = make_stream(producers=3, engine_options={'start_seconds': 60}); stream.start()\n"
        "print(*producers_of(stream, 3), flush=True); time.sleep(60)"
    )
    pids = pids_of(process)
    assert len(pids) == 3
    process.kill()
    process.communicate(timeout=100)
    assert_gone(pids)


def test_a_killed_trainer_leaves_nothing_although_a_forked_child_holds_its_descriptors():
    process = script(
        "stream = run()\nchild = os.fork()\nif child == 0:\n    time.sleep(60); os._exit(0)\n"
        "print(child, flush=True); time.sleep(60)"
    )
    pids = pids_of(process)
    (child,) = pids_of(process)
    process.kill()
    assert_gone(pids)
    assert running(child)
    os.kill(child, signal.SIGKILL)
    process.communicate(timeout=100)


def test_a_handler_of_sigterm_that_exits_gets_its_own_exit_code():
    process = script(
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "stream = run(engine_options={'seconds': 0.05})\nstream.take(10**6)"
    )
    pids = pids_of(process)
    process.terminate()
    _, errors = process.communicate(timeout=100)
    assert_gone(pids)
    assert (process.returncode, errors) == (143, "")


def test_a_script_needs_no_main_guard():
    process = script("stream = run(); print(len(stream.take(20)))")
    pids_of(process)
    assert process.stdout.readline().strip() == "20"
    _, errors = process.communicate(timeout=100)
    assert (errors, process.returncode) == ("", 0)


# Forked children.


def in_child(act) -> str:
    """Run in a forked child; returns what it returned or raised."""
    here, there = multiprocessing.Pipe()
    pid = os.fork()
    if pid == 0:
        try:
            there.send(repr(act()))
        except BaseException as error:
            there.send(f"{type(error).__name__}: {error}")
        os._exit(0)
    os.waitpid(pid, 0)
    return here.recv()


def test_a_forked_child_can_neither_use_nor_close_the_stream():
    with make_stream() as stream:
        stream.take(8)
        assert "a forked child, such as a DataLoader worker, cannot use it" in in_child(lambda: stream.take(1))
        assert "cannot use it" in in_child(lambda: stream.feedback([0], [1.0]))
        assert in_child(stream.close) == "None"
        assert in_child(lambda: stream._finalizer()) == "None"
        assert listed(stream, [30]) == undisturbed([8, 30])[8:]
        assert stream.stats().restarts == 0


def test_a_forked_child_can_have_a_stream_of_its_own():
    with make_stream() as stream:
        stream.take(8)
        assert in_child(lambda: undisturbed([5]) == undisturbed([5])) == "True"


def test_dataloader_workers_forked_after_the_start_leave_the_stream_alone():
    import torch
    from torch.utils.data import DataLoader

    with make_stream() as stream:
        images = listed(stream, [8])
        for _ in DataLoader(torch.arange(8), num_workers=2, multiprocessing_context="fork"):
            images += listed(stream, [5])
        images += listed(stream, [20])
        assert stream.stats().restarts == 0
    assert images == undisturbed([len(images)])


# Leaks.


def test_opened_and_closed_a_dozen_times_nothing_grows():
    with make_stream() as stream:
        stream.take(1)
    before = footprint()
    for cycle in range(12):
        stream = make_stream(memory=("memfd", "shm", "file")[cycle % 3])
        if cycle % 2:
            stream.start()
        if cycle % 4 == 1:
            stream.take(9)
            during = footprint()
            assert during.descriptors > before.descriptors and during.threads > before.threads  # something to leak
        if cycle % 5:
            stream.close()
        del stream
    assert_given_back(before)


def test_collected_as_garbage_it_gives_everything_back():
    before = footprint()
    stream = make_stream(producers=2)
    stream.take(1)
    pids = producers_of(stream, 2)
    during = footprint()
    assert all(getattr(during, name) > getattr(before, name) for name in ("descriptors", "threads", "mappings"))
    del stream
    gc.collect()
    assert_gone(pids)
    assert_given_back(before)


def test_closing_is_quick_also_in_the_middle_of_a_long_batch():
    def close() -> float:
        stream = make_stream(engine_options={"seconds": 60, "beat": False})
        stream.start()
        until(lambda: stream._fleet.rings[0].state == 1)
        closer = threading.Timer(0.3, stream.close)
        closer.start()
        with pytest.raises(StreamaugError):
            stream.take(1)
        began = time.monotonic()
        stream.close()
        took = time.monotonic() - began
        closer.join()
        return took

    assert_within(2, close)


def in_handler(stream, action: Callable[[], object], *, then: type[BaseException] | None = None) -> list[object]:
    """Take images until a call raises, in the middle of one of which a signal's handler acts and raises `then`."""
    seen: list[object] = []

    def handler(signum: int, frame: object) -> None:
        if not stream._in_take.locked():  # between two calls
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            return
        try:
            seen.append(action())
        except StreamaugError as error:
            seen.append(error)
        if then is not None:
            raise then

    old = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        while not seen:
            stream.take(48)
    finally:
        signal.signal(signal.SIGALRM, old)
    return seen


@pytest.mark.parametrize("then", [None, KeyboardInterrupt])
def test_a_signal_handler_may_close_the_stream_in_the_middle_of_take(tmp_path, then):
    before = footprint()
    stream = make_stream(engine_options={"seconds": 0.02}, manifest=tmp_path / "run.manifest")
    stream.take(8)

    def train() -> None:
        in_handler(stream, stream.close, then=then)
        stream.take(48)  # where the call was as good as done, it returned

    with pytest.raises(then or StreamaugError, match=None if then else "the stream was closed"):
        train()
    assert stream.state_dict()["next_k"] > 0
    with pytest.raises(StreamaugError, match="the stream was closed"):
        stream.take(1)
    assert_given_back(before)


def test_a_signal_handler_gets_the_state_before_take_and_may_change_nothing():
    with make_stream(engine_options={"seconds": 0.02}) as stream:
        stream.take(8)
        (told,) = in_handler(stream, stream.state_dict)
        for action in (partial(stream.take, 1), partial(stream.feedback, [0], [1.0]), partial(stream.replan)):
            (error,) = in_handler(stream, action)
            assert isinstance(error, UsageError) and "set a flag that the loop looks at" in str(error)
        delivered = 8 * told["undelivered"][0][0] + told["offsets"][0]
        assert (delivered - 8) % 48 == 0, "before the call"
        stream.load_state_dict(told)
        assert listed(stream, [40]) == undisturbed([delivered + 40])[delivered:]


# No pixels on disk.


def written(pid: int | str) -> dict[str, int]:
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


def test_what_is_written_to_files_does_not_grow_with_the_images():
    with make_stream(batch_size=32) as stream:
        stream.take(64)
        pids = ["self", *producers_of(stream)]
        before = [written(pid) for pid in pids]
        images = stream.take(32 * 100).images
        after = [written(pid) for pid in pids]
    assert images.nbytes > 200_000
    for one, other in zip(before, after, strict=True):
        assert other["write_bytes"] == one["write_bytes"]
        assert other["wchar"] - one["wchar"] < 1000

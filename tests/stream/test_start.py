"""How producers' processes come to be: afresh (spawn) or as copies of one that has imported everything (forkserver)."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from streamaug.errors import ProducerError, UsageError
from streamaug.stream.footprint import children, footprint
from streamaug.stream.producers import backends
from streamaug.stream.producers.processes import Output
from streamaug.stream.producers.starting import Starter, start_method

from . import fakes
from .fakes import (
    assert_given_back,
    assert_within,
    listed,
    make_stream,
    producers_of,
    running,
    undisturbed,
    until,
)

METHODS = ["spawn", "forkserver"]
TELLING = f"{__package__}.starting:build"


@pytest.fixture(autouse=True)
def others():
    """Processes that earlier tests' libraries started, and that stay."""
    before = footprint()
    yield set(children())
    assert_given_back(before)


# What is chosen.


def test_auto_copies_where_a_copy_is_as_good_as_a_new_process():
    assert start_method("auto", on_gpu=False, threads=1) == "forkserver if safe"
    assert start_method("auto", on_gpu=True, threads=1) == "spawn"
    assert start_method("auto", on_gpu=False, threads=2) == "spawn"
    assert [start_method(method, on_gpu=False, threads=2) for method in METHODS] == METHODS


def test_copies_on_a_gpu_are_refused_and_so_are_copies_where_the_system_has_none(monkeypatch):
    with pytest.raises(UsageError, match=r"a copied process cannot use a GPU safely; auto and spawn work"):
        start_method("forkserver", on_gpu=True, threads=1)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert start_method("auto", on_gpu=False, threads=1) == "spawn"
    with pytest.raises(UsageError, match="which darwin cannot do"):
        start_method("forkserver", on_gpu=False, threads=1)


@pytest.mark.parametrize(("method", "copied"), [("spawn", 0), ("forkserver", 1), ("auto", 1)])
def test_a_copy_imports_nothing_itself(method, copied, others):
    with make_stream(engine=TELLING, start_method=method) as stream:
        pixels = stream.take(8).images[:, 0, 0, :2]
        (above,) = set(children()) - others
        assert producers_of(stream) == (children(above) if copied else [above])
    assert (pixels == [copied, copied]).all()


# What is promised holds for both.


@pytest.mark.parametrize("method", METHODS)
def test_killed_in_the_middle_of_writing_the_next_one_delivers_the_same_images(method, monkeypatch):
    monkeypatch.setenv("STREAMAUG_FAULT", "mid_write:2")
    judge = np.arange(16, dtype=np.uint8)
    with make_stream(start_method=method, producers=2, judge=judge) as stream:
        assert listed(stream, [60]) == undisturbed([60], judge=judge)
        assert stream.stats().restarts == 2


@pytest.mark.parametrize("method", METHODS)
def test_a_producer_is_alone_in_its_session_and_holds_its_own_descriptors_only(method):
    judge = np.zeros(4, np.uint8)
    with make_stream(start_method=method, producers=3, judge=judge) as stream:
        stream.take(40)
        for pid in producers_of(stream, 3):
            assert os.getsid(pid) == os.getpgid(pid) == pid
            held = {int(fd): os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
            beyond = sorted(what.partition(":")[0] for fd, what in held.items() if fd > 2)
            assert beyond == [*4 * ["/memfd"], "socket"], held  # ring and mailboxes, each mapping its own; hints
            assert held[1] == held[2] != os.readlink("/proc/self/fd/1")


@pytest.mark.parametrize("method", METHODS)
def test_exit_code_and_last_words_arrive(method):
    options = {"exit_at": 2}
    with (
        make_stream(start_method=method, max_restarts=1, engine_options=options) as stream,
        pytest.raises(ProducerError, match=r"exited with code 3; its last words:\nwhat I last wanted to say"),
    ):
        stream.take(100)


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_producer_is_replaced(method, tmp_path):
    options = {"stop_at": 2, "once": str(tmp_path / "stopped")}
    with make_stream(start_method=method, stall_timeout=0.2, hang_timeout=0.5, engine_options=options) as stream:
        assert listed(stream, [40]) == undisturbed([40])
        assert stream.stats().restarts == 1


SCRIPT = f"""
import time
from {fakes.__name__} import make_stream
from streamaug.stream.footprint import children
stream = make_stream(producers=2, start_method={{method!r}}, engine_options={{options}})
stream.{{act}}
above = children()
print(*above, *[pid for one in above for pid in children(one)], flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("act", "options"), [("take(20)", {}), ("start()", {}), ("take(1)", {"seconds": 0.3})])
def test_a_killed_trainers_producers_and_what_they_are_copied_from_end_within_two_seconds(act, options, method):
    script = SCRIPT.format(method=method, options=options, act=act)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    trainer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
    pids = [int(pid) for pid in trainer.stdout.readline().split()]
    assert len(pids) >= (1 if act == "start()" and method == "forkserver" else 2)
    trainer.kill()
    trainer.communicate(timeout=100)
    until(lambda: not any(map(running, pids)), 2)


# Only what copies are made from.


def server_of(stream, count: int, others: set[int]) -> int:
    (server,) = set(children()) - others
    assert set(producers_of(stream, count)) == set(children(server))
    return server


def test_a_killed_server_takes_its_copies_along_and_all_are_replaced(others):
    with make_stream(start_method="forkserver", producers=2) as stream:
        images = listed(stream, [20])
        os.kill(server_of(stream, 2, others), signal.SIGKILL)
        until(lambda: stream.stats().restarts == 2)
        images += listed(stream, [60])
        assert images == undisturbed([80])


def test_a_server_that_says_nothing_of_a_dead_copy_is_replaced(others):
    with make_stream(start_method="forkserver") as stream:
        images = listed(stream, [20])
        server = server_of(stream, 1, others)
        (pid,) = producers_of(stream)
        os.kill(server, signal.SIGSTOP)
        os.kill(pid, signal.SIGKILL)
        images += listed(stream, [40])
        assert images == undisturbed([60])
        assert server_of(stream, 1, others) != server


def test_an_import_that_starts_a_thread_is_done_afresh_and_refused_where_a_copy_was_asked_for(
    monkeypatch, caplog, others
):
    monkeypatch.setenv("STARTING", "thread")
    caplog.set_level("INFO", logger="streamaug")
    with make_stream(engine=TELLING, producers=2) as stream:
        assert not stream.take(40).images[:, 0, 0, 0].any()
        os.kill(producers_of(stream, 2)[0], signal.SIGKILL)
        stream.take(40)
        until(lambda: len(set(children()) - others) == 2)  # the server, of no use, has gone
    assert "producers are started afresh: importing what the producer needs starts 1 threads" in caplog.text
    with (
        make_stream(engine=TELLING, start_method="forkserver") as stream,
        pytest.raises(UsageError, match=r"stream\.start_method is forkserver, but importing .* auto and spawn work"),
    ):
        stream.take(1)


def test_an_import_that_ends_the_process_is_an_error_with_its_last_words(monkeypatch):
    monkeypatch.setenv("STARTING", "exit")
    with (
        make_stream(engine=TELLING, max_restarts=1) as stream,
        pytest.raises(ProducerError, match=r"died 2 times .*exited with code 7; its last words:\nno room for me"),
    ):
        stream.take(1)


def test_there_is_one_server_for_each_environment(monkeypatch, others):
    kept = backends._environment

    def environment(work):
        environment.calls += 1
        return kept(work) | {"CUDA_VISIBLE_DEVICES": str(environment.calls % 2)}

    environment.calls = 0
    monkeypatch.setattr(backends, "_environment", environment)
    with make_stream(producers=4) as stream:
        stream.take(60)
        servers = set(children()) - others
        assert len(servers) == 2
        seen = {pid: Path(f"/proc/{pid}/environ").read_text() for one in servers for pid in children(one)}
    assert sorted(f"CUDA_VISIBLE_DEVICES={at}" in text for text in seen.values() for at in (0,)) == 2 * [False] + 2 * [
        True
    ]


def test_closing_while_the_server_imports_is_quick():
    def close() -> float:
        stream = make_stream(engine=f"{__package__}.drawing:build", start_method="forkserver")
        stream.start()
        began = time.monotonic()
        stream.close()
        return time.monotonic() - began

    assert_within(2, close)


def test_a_server_that_cannot_be_started_leaks_nothing(monkeypatch):
    def refuse(*arguments, **options):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    output = Output()
    with pytest.raises(OSError, match="temporarily"):
        Starter("forkserver", "os").start({}, {}, {}, output)
    output.close()

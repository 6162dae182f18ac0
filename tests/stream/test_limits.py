"""What a machine refuses, or does behind one's back: an error that can be read, or no effect."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import streamaug.stream
from streamaug.errors import MemoryTooSmall, StreamaugError
from streamaug.stream.footprint import children, footprint
from streamaug.stream.hashing import wild_clock
from streamaug.stream.ring import memory
from streamaug.stream.ring.memory import NAME_PREFIX

from .fakes import assert_given_back, descriptors_left, listed, make_stream, producers_of, running, undisturbed, until

TRY = """
import sys
from streamaug.errors import StreamaugError
from streamaug.stream.rehearsal import make_stream
try:
    with make_stream({options}) as stream:
        print(len(stream.take(9)), "images")
except StreamaugError as error:
    print(type(error).__name__, error)
"""


def output_of(code: str, *prefix: str) -> str:
    command = [*prefix, sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


# Memory.


def test_dev_shm_that_fills_up_after_it_was_looked_at_is_an_error_that_leaks_nothing(monkeypatch):
    before = footprint()

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with make_stream(memory="shm", producers=2) as stream:
        with pytest.raises(MemoryTooSmall, match=r"refused it \(No space left on device; stream.memory: shm\)"):
            stream.take(1)
        monkeypatch.undo()
        assert listed(stream, [20]) == undisturbed([20])  # there is room again
    assert_given_back(before)


def small_dev_shm() -> list[str]:
    """A command before which /dev/shm has 256 kB; nothing where this system does not let one have it."""
    inside = ["unshare", "--user", "--map-root-user", "--mount", "--", "sh", "-c"]
    mount = "mount -t tmpfs -o size=256k tmpfs /dev/shm && "
    if shutil.which("unshare") is None or subprocess.run([*inside, mount + "true"], capture_output=True).returncode:
        return []
    return [*inside, mount + 'exec "$@"', "sh"]


def test_a_ring_that_dev_shm_cannot_hold_is_refused_before_anything_starts():
    prefix = small_dev_shm()
    if not prefix:  # then by what it is told
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(memory, "_space", lambda folder: 256_000)
            with pytest.raises(MemoryTooSmall, match=r"stream\.memory: shm"):
                make_stream(memory="shm", batch_size=4096)
        return
    refused = output_of(TRY.format(options="memory='shm', batch_size=4096"), *prefix)
    assert re.match(r"MemoryTooSmall the ring needs \d\.\d MB .*only 262\.1 kB are free in /dev/shm", refused), refused
    assert output_of(TRY.format(options="memory='memfd', batch_size=4096"), *prefix) == "9 images"


def test_little_address_space_is_an_error_that_can_be_read():
    limit = (
        "import resource, threading\n"
        "import streamaug.stream.rehearsal\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 100_000_000,) * 2)\n"
    )
    said = output_of(limit + TRY.format(options="batch_size=10**6"))
    assert re.match(r"MemoryTooSmall the ring needs .* the system refused it \(Cannot allocate memory", said), said


# Descriptors, threads, processes.


@pytest.mark.parametrize("spare", [0, 3, 5, 6, 8, 10, 12, 16])
def test_with_so_many_descriptors_left_it_works_or_says_what_is_missing_and_leaks_none(spare):
    before = footprint()
    with make_stream() as stream, descriptors_left(spare):
        said = said_by(stream)
    assert said == "" if spare >= 14 else "Too many open files (see ulimit -n" in said or (said == "" and spare > 8)
    assert_given_back(before)


def said_by(stream) -> str:
    try:
        stream.take(9)
    except StreamaugError as error:
        return str(error)
    return ""


def test_a_thread_that_cannot_be_started_is_an_error_that_leaks_nothing(monkeypatch):
    before = footprint()
    stream = make_stream(producers=2)

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(StreamaugError, match=r"cannot be watched: can't start new thread \(see ulimit -u\)"):
        stream.take(1)
    monkeypatch.undo()
    stream.close()
    assert_given_back(before)


def test_a_process_that_cannot_be_started_is_an_error_that_leaks_nothing(monkeypatch):
    before = footprint()

    def refuse(*arguments, **options):
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with (
        make_stream(producers=2) as stream,
        pytest.raises(StreamaugError, match=r"cannot be started: Resource temporarily unavailable .*ulimit -u"),
    ):
        stream.take(1)
    assert_given_back(before)


# The clock.


def test_a_clock_that_jumps_has_no_effect_on_either_side(monkeypatch, caplog):
    monkeypatch.setattr(time, "time", wild_clock())
    options = {"wild_clock": True, "seconds": 0.02}
    with make_stream(stall_timeout=30, hang_timeout=60, start_timeout=90, engine_options=options) as stream:
        images = listed(stream, [5] * 20)
        stats = stream.stats()
    assert images == undisturbed([100])
    assert stats.restarts == 0 and "progress" not in caplog.text
    assert 0 < stats.mean_age_seconds < 60 and 0 < stats.stall_seconds < 60 and 0 < stream.rate < 10_000


def test_no_source_of_the_stream_reads_the_wall_clock():
    for path in Path(streamaug.stream.__path__[0]).rglob("*.py"):
        reads = re.findall(r"time\.time(?:_ns)?\(|datetime", path.read_text())
        assert not reads, path.name


# Blocks that have a name for a moment, where a file system makes none without.

NAMED = """
import os, signal, sys, tempfile, time
from streamaug.stream.ring import memory
del os.O_TMPFILE
unlink = os.unlink
def at_unlink(path, **options):
    print(path, flush=True)
    {then}
os.unlink = at_unlink
memory.SHM_FOLDER = tempfile.tempdir = {folder!r}
memory.Memory.create({kind!r}, 5000)
"""


def start_named(folder: Path, kind: str, then: str) -> subprocess.Popen:
    code = NAMED.format(folder=str(folder), kind=kind, then=then)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("kind", ["shm", "file"])
def test_a_name_that_a_killed_process_left_is_removed_at_the_next_start_and_a_living_ones_is_not(
    kind, tmp_path, monkeypatch
):
    dead = start_named(tmp_path, kind, "os.kill(os.getpid(), signal.SIGKILL)")
    left = Path(dead.communicate(timeout=100)[0].strip())
    assert dead.returncode == -signal.SIGKILL and left.exists() and left.name.startswith(NAME_PREFIX)
    alive = start_named(tmp_path, kind, "time.sleep(60)")
    held = Path(alive.stdout.readline().strip())
    other = tmp_path / "streamaug-ring.txt"
    other.touch()

    monkeypatch.delattr(os, "O_TMPFILE")
    monkeypatch.setattr(memory, "SHM_FOLDER", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with make_stream(memory=kind) as stream:
        assert listed(stream, [20]) == undisturbed([20])
        assert set(tmp_path.iterdir()) == {held, other}
    alive.kill()
    alive.communicate(timeout=100)
    with make_stream(memory=kind) as stream:
        stream.start()
        assert set(tmp_path.iterdir()) == {other}


@pytest.mark.parametrize("kind", ["memfd", "shm", "file"])
def test_a_process_killed_while_it_makes_a_block_without_a_name_leaves_nothing(kind, tmp_path):
    code = (
        "import os, signal, tempfile\nfrom streamaug.stream.ring import memory\n"
        f"memory.SHM_FOLDER = tempfile.tempdir = {str(tmp_path)!r}\n"
        "os.ftruncate = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"memory.Memory.create({kind!r}, 5000)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=100).returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


# Streams within streams.


def producers_left() -> set[int]:
    """The copies that this process's fork servers made."""
    return {producer for server in children() for producer in children(server)}


def test_a_stream_opened_used_and_closed_within_another_ones_loop_disturbs_nobody():
    outer, inner, others = [], [], producers_left()
    with make_stream(seed=1) as one:
        for step in range(4):
            outer += listed(one, [9])
            with make_stream(seed=2, producers=2) as two:
                for _ in range(2):
                    inner += listed(two, [5])
                    outer += listed(one, [3])
            assert producers_left() - others == set(producers_of(one)), step
    assert outer == undisturbed([60], seed=1)
    assert inner == 4 * undisturbed([10], seed=2)


def test_a_stream_within_a_producer_ends_with_it():
    with make_stream(engine="streamaug.stream.rehearsal:build_nested") as stream:
        images = listed(stream, [40])
        (pid,) = producers_of(stream)
        grandchildren = children(pid)
        os.kill(pid, signal.SIGKILL)
        images += listed(stream, [40])
        assert len(grandchildren) == 1
        until(lambda: not running(grandchildren[0]), 5)
        grandchildren = children(*producers_of(stream))
    until(lambda: not any(map(running, grandchildren)), 5)
    assert len(grandchildren) == 1
    assert images == undisturbed([80])

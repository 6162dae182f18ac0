import os
import resource
import subprocess
import sys

import numpy as np
import pytest

from streamaug.errors import MemoryTooSmall, StreamaugError
from streamaug.stream import memory
from streamaug.stream.memory import Memory

from .fakes import make_stream


@pytest.mark.parametrize("kind", ["memfd", "shm", "file"])
def test_a_block_is_shared_through_its_descriptor_and_has_no_name(kind):
    before = set(os.listdir("/dev/shm"))
    block = Memory.create(kind, 10_000)
    other = Memory.attach(os.dup(block.fd), 10_000)
    np.frombuffer(block.view, np.uint8)[:] = 7
    assert (np.frombuffer(other.view, np.uint8) == 7).all()
    assert set(os.listdir("/dev/shm")) == before
    assert os.fstat(block.fd).st_nlink == 0
    block.close()
    other.close()


def test_auto_is_a_kind_without_a_file_system():
    assert memory.choose("auto") == "memfd"
    assert memory.choose("shm") == "shm"


def test_a_ring_larger_than_memory_is_refused_with_numbers_and_help():
    with pytest.raises(MemoryTooSmall) as error:
        make_stream(batch_size=10**12)
    message = str(error.value)
    assert "the ring needs" in message and "TB" in message and "are free in memory" in message
    assert "stream.batch_size" in message and "--shm-size" in message
    assert "\n" not in message


def test_a_small_dev_shm_is_refused_although_there_is_memory(monkeypatch):
    monkeypatch.setattr(memory, "_space", lambda folder: 64_000)
    with pytest.raises(MemoryTooSmall, match=r"64\.0 kB are free in /dev/shm \(stream.memory: shm\)"):
        make_stream(memory="shm")
    make_stream(memory="memfd").close()


def test_a_limited_process_gets_an_error_it_can_read():
    code = (
        "import resource, streamaug.stream.memory as memory\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n    memory.Memory.create('memfd', 10**6)\n"
        "except memory.MemoryTooSmall as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=True)
    assert "the ring needs 1.0 MB and the system refused it (File too large" in done.stdout


def test_too_few_descriptors_are_an_error_and_leak_none():
    stream = make_stream(producers=3)
    before = len(os.listdir("/proc/self/fd"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + 5, hard))
    try:
        with pytest.raises(StreamaugError, match="Too many open files"):
            stream.start()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    stream.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (64_000_000, "64.0 MB"), (2 * 10**15, "2000.0 TB")],
)
def test_byte_counts_are_written_as_people_do(nbytes, text):
    assert memory.human(nbytes) == text

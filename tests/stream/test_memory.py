import os
import subprocess
import sys

import numpy as np
import pytest
import segments

from streamaug.errors import MemoryTooSmall, StreamaugError
from streamaug.stream.ring import memory
from streamaug.stream.ring.memory import Memory

from .fakes import descriptors_left, listed, make_stream, undisturbed


@pytest.mark.parametrize("kind", ["memfd", "shm", "file"])
def test_a_block_is_shared_through_its_descriptor_and_has_no_name(kind):
    before = segments.names()
    block = Memory.create(kind, 10_000)
    other = Memory.attach(os.dup(block.fd), 10_000)
    np.frombuffer(block.view, np.uint8)[:] = 7
    assert (np.frombuffer(other.view, np.uint8) == 7).all()
    assert not segments.left_behind(before)
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
        "import resource, streamaug.stream.ring.memory as memory\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n    memory.Memory.create('memfd', 10**6)\n"
        "except memory.MemoryTooSmall as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert "the ring needs 1.0 MB and the system refused it (File too large" in done.stdout


def test_too_few_descriptors_are_an_error_and_leak_none():
    stream = make_stream(producers=3)
    before = len(os.listdir("/proc/self/fd"))
    with descriptors_left(6), pytest.raises(StreamaugError, match="Too many open files"):
        stream.start()
    stream.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (64_000_000, "64.0 MB"), (2 * 10**15, "2000.0 TB")],
)
def test_byte_counts_are_written_as_people_do(nbytes, text):
    assert memory.human(nbytes) == text


# Huge pages.


@pytest.mark.parametrize("kind", ["memfd", "shm", "file"])
def test_blocks_ask_for_huge_pages_where_the_system_would_give_them(kind, tmp_path, monkeypatch):
    (tmp_path / "shmem_enabled").write_text("always within_size [advise] never deny force\n")
    monkeypatch.setattr(memory, "_HUGE_PAGES", tmp_path)
    monkeypatch.setattr(memory, "_in_reserved_pages", lambda nbytes: None)
    block = Memory.create(kind, 3_000_000, huge_pages=True)
    other = Memory.attach(block.fd, 3_000_000)
    block.view[2_999_999] = 7
    assert (block.huge_pages, other.view[2_999_999], len(other.view)) == ("transparent", 7, 3_000_000)
    block.close()


def test_reserved_huge_pages_are_used_where_there_are_enough(monkeypatch):
    size, made = memory._huge_page_nbytes(), []

    def memfd_create(name, flags):
        made.append(flags)
        return create(name, flags & ~os.MFD_HUGETLB)  # ordinary pages here: nobody may reserve any for a test

    create = os.memfd_create
    monkeypatch.setattr(os, "memfd_create", memfd_create)
    block = Memory.create("memfd", 5000, huge_pages=True)
    assert made[0] & os.MFD_HUGETLB
    assert (block.huge_pages, block.nbytes, len(block.view)) == ("reserved", 5000, 5000)
    assert os.fstat(block.fd).st_size == size  # of which there can only be a whole number
    other = Memory.attach(os.dup(block.fd), 5000)
    block.view[4999] = 9
    assert (other.view[4999], len(other._map)) == (9, size)
    block.close()
    other.close()


def test_where_there_are_no_huge_pages_it_says_so_once_with_what_helps_and_goes_on(tmp_path, monkeypatch, caplog):
    (tmp_path / "shmem_enabled").write_text("always within_size advise [never] deny force\n")
    monkeypatch.setattr(memory, "_HUGE_PAGES", tmp_path)
    monkeypatch.setattr(memory, "_in_reserved_pages", lambda nbytes: None)
    before = len(os.listdir("/proc/self/fd"))
    with make_stream(huge_pages=True, producers=2) as stream:
        assert listed(stream, [20]) == undisturbed([20])
    assert len(os.listdir("/proc/self/fd")) == before
    (said,) = [record.getMessage() for record in caplog.records if "huge_pages" in record.getMessage()]
    assert "shmem_enabled is never: write advise to it, or reserve some: sysctl vm.nr_hugepages=N" in said


def test_too_few_reserved_pages_leak_no_descriptor():
    before = len(os.listdir("/proc/self/fd"))
    assert memory._in_reserved_pages(1 << 50) is None
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("kind", ["shm", "file"])
def test_without_memfd_auto_is_dev_shm_and_where_that_is_too_small_a_file(kind, monkeypatch):
    def refuse():
        raise OSError("not here")

    monkeypatch.setattr(memory, "_open_memfd", refuse)
    if kind == "file":
        space = memory._space
        monkeypatch.setattr(memory, "_space", lambda at: 64_000 if at == memory.SHM_FOLDER else space(at))
    with make_stream() as stream:
        assert listed(stream, [20]) == undisturbed([20])
        assert stream._fleet.placement.host == kind


def test_without_memfd_and_dev_shm_auto_is_a_file(monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    monkeypatch.setattr(memory, "SHM_FOLDER", "/nowhere")
    assert memory.choose("auto") == "file"

"""Where ring slots live: shared memory that has no name, held by file descriptor only.

A block without a name cannot outlive the processes that map it, whatever kills them: there is nothing to
clean up. Only where a file system makes no nameless files does a block have a name, for the moment between making and
unlinking it; what a process that was killed in that moment left is removed when the next one makes such a block.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import tempfile
from pathlib import Path
from typing import Literal

from streamaug.errors import MemoryTooSmall

Kind = Literal["memfd", "shm", "file", "private"]
HugePages = Literal["reserved", "transparent", ""]

SHM_FOLDER = "/dev/shm"
NAME_PREFIX = "streamaug-ring-"
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
_MADV_POPULATE_WRITE = 23  # Linux 5.14; not in the mmap module


class Memory:
    """`nbytes` of zeroed memory. `view` is its buffer; `fd` is what another process maps (None when private);
    `huge_pages` is what kind of them it has, "" for none."""

    def __init__(self, nbytes: int, fd: int | None, huge_pages: HugePages = ""):
        # Of reserved huge pages a mapping has a whole number, which is what the block was made with.
        length = nbytes if fd is None else max(nbytes, os.fstat(fd).st_size)
        if fd is None:
            self._map = mmap.mmap(-1, length)
        else:
            populate = 0 if huge_pages == "transparent" else getattr(mmap, "MAP_POPULATE", 0)
            self._map = mmap.mmap(fd, length, flags=mmap.MAP_SHARED | populate)
        if huge_pages == "transparent":
            self._map.madvise(mmap.MADV_HUGEPAGE)
            with contextlib.suppress(OSError):  # an older kernel: they come one by one
                self._map.madvise(_MADV_POPULATE_WRITE)
        self.nbytes = nbytes
        self.fd = fd
        self.huge_pages = huge_pages
        self.view = memoryview(self._map)[:nbytes]

    @classmethod
    def create(cls, kind: Kind, nbytes: int, *, huge_pages: bool = False) -> "Memory":
        """Allocate and reserve the block, in huge pages where they are wanted and this system has them. Raises
        MemoryTooSmall when the system refuses."""
        fd = None
        if huge_pages and kind == "memfd" and (block := _in_reserved_pages(nbytes)) is not None:
            return block
        pages: HugePages = "transparent" if huge_pages and _transparent_pages() else ""
        try:
            if kind != "private":
                fd = _OPEN[kind]()
                os.ftruncate(fd, nbytes)
                if hasattr(os, "posix_fallocate") and not pages:  # which would reserve small ones
                    os.posix_fallocate(fd, 0, nbytes)  # a full file system says so now, not as a SIGBUS later
            return cls(nbytes, fd, pages)
        except OSError as error:
            if fd is not None:
                os.close(fd)
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise
            raise MemoryTooSmall(
                f"the ring needs {human(nbytes)} and the system refused it ({error.strerror}; "
                f"stream.memory: {kind}); {_WHAT_HELPS}"
            ) from None

    @classmethod
    def attach(cls, fd: int, nbytes: int) -> "Memory":
        """Map a block that another process created and whose descriptor this one inherited."""
        return cls(nbytes, fd)

    def close(self) -> None:
        """Give the descriptor back; the mapping goes when the last array that looks into it goes."""
        fd, self.fd = self.fd, None  # first: who calls again after an interruption does not close another's
        if fd is not None:
            os.close(fd)
        self.view = memoryview(b"")
        with contextlib.suppress(BufferError):
            self._map.close()


def _in_reserved_pages(nbytes: int) -> Memory | None:
    """A block in huge pages that were set aside (vm.nr_hugepages); None where there are too few."""
    size = _huge_page_nbytes()
    if not size or not hasattr(os, "MFD_HUGETLB"):
        return None
    length = -(-nbytes // size) * size
    fd = None
    try:
        fd = os.memfd_create("streamaug", os.MFD_CLOEXEC | os.MFD_HUGETLB)
        os.ftruncate(fd, length)
        os.posix_fallocate(fd, 0, length)
        return Memory(nbytes, fd, "reserved")
    except OSError:
        if fd is not None:
            os.close(fd)
        return None


def _transparent_pages() -> bool:
    """Whether this system makes huge pages of shared memory that asks for them (madvise); a private block is shared
    memory too, which nobody else maps."""
    return hasattr(mmap, "MADV_HUGEPAGE") and _setting_of_huge_pages() not in ("", "never", "deny")


def why_no_huge_pages(kind: Kind) -> str:
    """What to change on this system so that blocks of this kind are in huge pages."""
    if not hasattr(mmap, "MADV_HUGEPAGE") or not (found := _setting_of_huge_pages()):
        return "this system has none"
    reserve = "" if kind != "memfd" else ", or reserve some: sysctl vm.nr_hugepages=N"
    return f"{_HUGE_PAGES}/shmem_enabled is {found}: write advise to it{reserve}"


def _setting_of_huge_pages() -> str:
    """The bracketed word of "always within_size [advise] never"."""
    try:
        return (_HUGE_PAGES / "shmem_enabled").read_text().partition("[")[2].partition("]")[0]
    except OSError:
        return ""


def _huge_page_nbytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Hugepagesize:")), 0)


def choose(setting: str, nbytes: int = 0) -> Kind:
    """The kind of host memory that stream.memory means on this machine for so many bytes; auto, pinned and cuda leave
    it open: then it is memfd, and where there is none /dev/shm, and where that is too small a file."""
    if setting not in ("auto", "pinned", "cuda"):
        return setting  # type: ignore[return-value]
    try:
        os.close(_open_memfd())
        return "memfd"
    except (OSError, AttributeError):
        return "shm" if os.path.isdir(SHM_FOLDER) and available("shm") >= nbytes else "file"


def available(kind: Kind) -> int:
    """Bytes that a new block of this kind can have: free memory, the container's limit, the file system's
    space."""
    limits = [_system_memory(), _container_memory()]
    if kind == "shm":
        limits.append(_space(SHM_FOLDER))
    if kind == "file":
        limits = [_space(tempfile.gettempdir())]
    return min(limits)


def require(kind: Kind, nbytes: int, what: str) -> None:
    """Raise MemoryTooSmall unless `nbytes` fit; `what` describes what they are for."""
    there = available(kind)
    if nbytes <= there:
        return
    where = {"shm": SHM_FOLDER, "file": tempfile.gettempdir()}.get(kind, "memory")
    if kind == "shm" and not os.path.isdir(SHM_FOLDER):
        where += ", which does not exist"
    raise MemoryTooSmall(
        f"the ring needs {human(nbytes)} ({what}), but only {human(there)} are free in {where} "
        f"(stream.memory: {kind}); {_WHAT_HELPS}"
    )


def human(nbytes: int) -> str:
    """A byte count as people write it: 64.0 MB."""
    size, unit = float(nbytes), "bytes"
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"


_WHAT_HELPS = (
    "what helps: a smaller stream.batch_size or stream.in_flight, stream.memory: memfd, "
    "or more shared memory (docker run --shm-size=2g; mount -o remount,size=2g /dev/shm)"
)


def _open_memfd() -> int:
    return os.memfd_create("streamaug", os.MFD_CLOEXEC)


def _open_shm() -> int:
    return _open_unnamed(SHM_FOLDER)


def _open_file() -> int:
    return _open_unnamed(tempfile.gettempdir())


def _open_unnamed(folder: str) -> int:
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except (OSError, AttributeError):
        return _open_and_unlink(folder)


def _open_and_unlink(folder: str) -> int:
    _remove_left_behind(folder)
    fd, path = tempfile.mkstemp(prefix=NAME_PREFIX, dir=folder)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(fd, fcntl.LOCK_EX)  # says that the owner lives, across containers too
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _remove_left_behind(folder: str) -> None:
    """Remove the names of blocks whose owner died before it could."""
    for name in os.listdir(folder):
        if name.startswith(NAME_PREFIX):
            with contextlib.suppress(OSError):  # somebody else's, or gone already
                _remove_unless_locked(os.path.join(folder, name))


def _remove_unless_locked(path: str) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
    finally:
        os.close(fd)


_OPEN = {"memfd": _open_memfd, "shm": _open_shm, "file": _open_file}

_NO_LIMIT = 1 << 62


def _system_memory() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return _NO_LIMIT


def _container_memory() -> int:
    """What the memory limits of this process's control groups (version 1 and 2) leave."""
    try:
        groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return _NO_LIMIT
    least = _NO_LIMIT
    for _, controllers, path in groups:
        if controllers == "":
            root, limit_name, used_name = Path("/sys/fs/cgroup"), "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root = Path("/sys/fs/cgroup/memory")
            limit_name, used_name = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        folder = root / path.lstrip("/")
        for group in (folder, *folder.parents):
            least = min(least, _left_in_group(group, limit_name, used_name))
            if group == root:
                break
    return least


def _left_in_group(group: Path, limit_name: str, used_name: str) -> int:
    try:
        limit, used = int((group / limit_name).read_text()), int((group / used_name).read_text())
        cache = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group here, or the limit is "max"
        return _NO_LIMIT
    return max(limit - used + int(cache.get("inactive_file", 0)), 0)


def _space(folder: str) -> int:
    try:
        stat = os.statvfs(folder)
    except OSError:
        return 0
    return stat.f_bavail * stat.f_frsize

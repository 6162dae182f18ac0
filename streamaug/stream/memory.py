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

SHM_FOLDER = "/dev/shm"
NAME_PREFIX = "streamaug-ring-"


class Memory:
    """`nbytes` of zeroed memory. `view` is its buffer; `fd` is what another process maps (None when
    private)."""

    def __init__(self, nbytes: int, fd: int | None):
        flags = getattr(mmap, "MAP_POPULATE", 0)
        if fd is None:
            self._map = mmap.mmap(-1, nbytes)
        else:
            self._map = mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED | flags)
        self.nbytes = nbytes
        self.fd = fd
        self.view = memoryview(self._map)

    @classmethod
    def create(cls, kind: Kind, nbytes: int) -> "Memory":
        """Allocate and reserve the block. Raises MemoryTooSmall when the system refuses."""
        fd = None
        try:
            if kind != "private":
                fd = _OPEN[kind]()
                os.ftruncate(fd, nbytes)
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(fd, 0, nbytes)  # a full file system says so now, not as a SIGBUS later
            return cls(nbytes, fd)
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
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None
        self.view = memoryview(b"")
        with contextlib.suppress(BufferError):
            self._map.close()


def choose(setting: str) -> Kind:
    """The kind of memory that stream.memory (auto, memfd, shm, file) means on this machine."""
    if setting != "auto":
        return setting  # type: ignore[return-value]
    try:
        os.close(_open_memfd())
        return "memfd"
    except (OSError, AttributeError):
        return "shm" if os.path.isdir(SHM_FOLDER) else "file"


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

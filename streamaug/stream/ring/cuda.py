"""Every call into CUDA that the ring makes, behind one small object: tests put a double in its place.

Device memory is allocated by the CUDA runtime itself and not by torch's allocator, whose blocks cannot be shared where
segments are expandable, and are shared whole with whatever else lives in them. Not run on a GPU yet.
"""

import contextlib
import ctypes
import importlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from streamaug.errors import StreamaugError

PROVIDER = f"{__name__}:Cuda"  # what `connect` calls; producers are told


class Event(Protocol):
    def query(self) -> bool:
        """Whether the device has got there."""


class CudaError(StreamaugError):
    """The CUDA runtime refused a call; the message has its own words."""


class Cuda:
    """The GPUs that this process sees, by torch's index; pointers are plain integers."""

    def __init__(self) -> None:
        import torch

        self._torch = torch
        self._loaded: ctypes.CDLL | None = None

    # Devices.

    def count(self) -> int:
        return self._torch.cuda.device_count() if self._torch.cuda.is_available() else 0

    def index(self, device: str) -> int:
        """Of "cuda" or "cuda:1"."""
        found = self._torch.device(device).index
        return self._torch.cuda.current_device() if found is None else found

    def uuid(self, index: int) -> str:
        return str(self._torch.cuda.get_device_properties(index).uuid)

    def can_access(self, index: int, peer: int) -> bool:
        """Whether kernels on one GPU can read and write the memory of another."""
        return index == peer or self._torch.cuda.can_device_access_peer(index, peer)

    def free_nbytes(self, index: int) -> int:
        return self._torch.cuda.mem_get_info(index)[0]

    # Memory of a device.

    def allocate(self, index: int, nbytes: int) -> int:
        pointer = ctypes.c_void_p()
        with self._on(index):
            self._call("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(nbytes))
            self._call("cudaMemset", pointer, ctypes.c_int(0), ctypes.c_size_t(nbytes))
        assert pointer.value is not None
        return pointer.value

    def free(self, index: int, pointer: int) -> None:
        with self._on(index):
            self._call("cudaFree", ctypes.c_void_p(pointer))

    def export(self, index: int, pointer: int) -> bytes:
        """A handle of memory that `allocate` gave, with which another process can open it."""
        handle = _Handle()
        with self._on(index):
            self._call("cudaIpcGetMemHandle", ctypes.byref(handle), ctypes.c_void_p(pointer))
        return bytes(handle)

    def open(self, index: int, handle: bytes) -> int:
        """Map another process's memory, which lives on GPU `index`."""
        pointer, lazy_enable_peer_access = ctypes.c_void_p(), ctypes.c_uint(1)
        with self._on(index):
            given = _Handle.from_buffer_copy(handle)
            self._call("cudaIpcOpenMemHandle", ctypes.byref(pointer), given, lazy_enable_peer_access)
        assert pointer.value is not None
        return pointer.value

    def close(self, index: int, pointer: int) -> None:
        """Unmap what `open` gave."""
        with self._on(index):
            self._call("cudaIpcCloseMemHandle", ctypes.c_void_p(pointer))

    def tensor(self, index: int, pointer: int, shape: tuple[int, ...]) -> Any:
        """A uint8 tensor that looks into memory of GPU `index`, which must outlive it."""
        with self._on(index):
            return self._torch.as_tensor(_Pointer(pointer, shape))

    def empty(self, index: int, shape: tuple[int, ...]) -> Any:
        """A uint8 tensor of torch's own on GPU `index`."""
        return self._torch.empty(shape, dtype=self._torch.uint8, device=f"cuda:{index}")

    # Memory of the host.

    def register(self, address: int, nbytes: int) -> None:
        """Pin pages of this process, which a GPU then reads and writes without a copy in between."""
        self._torch.cuda.init()
        portable = ctypes.c_uint(1)
        self._call("cudaHostRegister", ctypes.c_void_p(address), ctypes.c_size_t(nbytes), portable)

    def unregister(self, address: int) -> None:
        self._call("cudaHostUnregister", ctypes.c_void_p(address))

    # Time.

    def record(self, index: int) -> Event:
        """An event behind all that was given to the current stream of that GPU so far."""
        event = self._torch.cuda.Event(blocking=False)
        event.record(self._torch.cuda.current_stream(index))
        return event

    @contextlib.contextmanager
    def stream(self, index: int, *, foreground: bool) -> Iterator[None]:
        """Run on a stream of the least priority there is, or of the greatest, for whoever must not wait."""
        least, greatest = self._torch.cuda.Stream.priority_range()  # type: ignore[call-arg]  # it is static
        stream = self._torch.cuda.Stream(index, priority=greatest if foreground else least)
        stream.wait_stream(self._torch.cuda.current_stream(index))
        with self._torch.cuda.stream(stream):
            yield

    def _on(self, index: int) -> Any:
        return self._torch.cuda.device(index)

    def _call(self, name: str, *arguments: Any) -> None:
        runtime = self._runtime()
        code = getattr(runtime, name)(*arguments)
        if code:
            runtime.cudaGetLastError()  # else torch would find it and blame a call of its own
            runtime.cudaGetErrorString.restype = ctypes.c_char_p
            words = runtime.cudaGetErrorString(code).decode()
            raise CudaError(f"{name}: {words} (CUDA error {code})")

    def _runtime(self) -> ctypes.CDLL:
        """The runtime that torch has loaded."""
        if self._loaded is None:
            version = self._torch.version.cuda
            if version is None:
                raise CudaError("this build of torch has no CUDA; stream.memory: auto works")
            name = f"libcudart.so.{version.partition('.')[0]}"
            try:
                self._loaded = ctypes.CDLL(name)
            except OSError as error:
                raise CudaError(f"torch's CUDA runtime was not found: {error}; stream.memory: memfd works") from None
        return self._loaded


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_ubyte * 64),)


class _Pointer:
    def __init__(self, pointer: int, shape: tuple[int, ...]):
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": "|u1",
            "data": (pointer, False),
            "strides": None,
            "version": 3,
        }


def connect() -> Cuda:
    module, _, name = PROVIDER.partition(":")
    make: Callable[[], Cuda] = getattr(importlib.import_module(module), name)
    return make()


@contextlib.contextmanager
def foreground(device: str = "cuda") -> Iterator[None]:
    """Train in this block on a stream of the greatest priority, so that a producer on the same GPU gives way:

    `with foreground(): train()`. A producer that is a process of its own gives way under NVIDIA MPS alone.
    """
    cuda = connect()
    with cuda.stream(cuda.index(device), foreground=True):
        yield

"""Where the images of a ring's slots live: in the ring's own block, pinned there for a GPU, or in a GPU's memory.

Sequence numbers, counts and all else stay in the block, which both sides can read without a GPU. The trainer allocates;
a producer opens what it is told of once, when it starts. Two processes agree on a GPU by its UUID: indices differ with
CUDA_VISIBLE_DEVICES.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from streamaug.errors import MemoryTooSmall, StreamaugError, UsageError
from streamaug.stream.ring.cuda import Cuda, CudaError, Event, connect
from streamaug.stream.ring.memory import Memory, human

log = logging.getLogger("streamaug")

_ALIGNMENT = 256  # of a slot in a GPU's memory


class Images(Protocol):
    """The images of a ring, as one side sees them. On the trainer's side it owns them."""

    def of_slot(self, at: int, in_block: np.ndarray | None) -> Any:
        """uint8 [B, C, H, W], an array or a tensor on a GPU; in_block: the slot's share of the ring's block."""

    def copied(self) -> Event | None:
        """Behind a copy out of a slot that this side has just given to its GPU; None when copies end where they
        begin."""

    def share(self) -> dict[str, Any] | None:
        """What a producer's `attach` must know, as JSON; None for images in the block that need nothing."""

    def close(self) -> None: ...


class PinnedImages:
    """In the ring's block, registered with CUDA on the sides that have a GPU. `required`: else it is tried."""

    def __init__(self, memory: Memory, here: str, *, required: bool):
        """here: this side's device."""
        self._required = required
        self._address: int | None = None
        self._cuda: Cuda | None = None
        if here == "cpu":
            return
        self._cuda = connect()
        self._index = self._cuda.index(here)
        address = np.frombuffer(memory.view, np.uint8).ctypes.data
        try:
            self._cuda.register(address, memory.nbytes)
            self._address = address
        except CudaError as error:
            if required:
                raise StreamaugError(
                    f"the ring's {human(memory.nbytes)} cannot be pinned: {error}; more of them (ulimit -l), or "
                    "stream.memory: memfd"
                ) from None
            log.warning("the ring is not pinned, copies to and from the GPU are slower: %s", error)

    def of_slot(self, at: int, in_block: np.ndarray | None) -> np.ndarray:
        assert in_block is not None
        return in_block

    def copied(self) -> Event | None:
        return self._cuda.record(self._index) if self._cuda is not None and self._address is not None else None

    def share(self) -> dict[str, Any]:
        return {"kind": "pinned", "required": self._required}

    def close(self) -> None:
        address, self._address = self._address, None
        if address is not None and self._cuda is not None:
            self._cuda.unregister(address)


class DeviceImages:
    """In memory of a GPU: `allocate` on the trainer's side, `attach` on a producer's."""

    def __init__(self, cuda: Cuda, index: int, pointer: int, shape: tuple[int, ...], *, owned: bool):
        """shape: (slots, B, C, H, W)."""
        slots, *image_shape = shape
        step = slot_nbytes(tuple(image_shape))
        self._cuda, self._index, self._pointer = cuda, index, pointer
        self._slots = [cuda.tensor(index, pointer + at * step, tuple(image_shape)) for at in range(slots)]
        self._owned = owned

    @classmethod
    def allocate(cls, device: str, shape: tuple[int, ...]) -> "DeviceImages":
        """Raises MemoryTooSmall."""
        cuda = connect()
        index = cuda.index(device)
        nbytes = shape[0] * slot_nbytes(shape[1:])
        require(cuda, index, nbytes)
        try:
            return cls(cuda, index, cuda.allocate(index, nbytes), shape, owned=True)
        except CudaError as error:
            raise MemoryTooSmall(
                f"the ring needs {human(nbytes)} on GPU {index} and it refused: {error}; {_HELP}"
            ) from None

    @classmethod
    def attach(cls, shared: Mapping[str, Any], shape: tuple[int, ...], here: str) -> "DeviceImages":
        """here: the producer's own device. Raises UsageError when it cannot reach the trainer's GPU."""
        cuda = connect()
        own = cuda.index(here)
        index = next((at for at in range(cuda.count()) if cuda.uuid(at) == shared["uuid"]), None)
        if index is None:
            raise UsageError(
                f"the producer does not see the trainer's GPU {shared['uuid']}: it sees "
                f"{', '.join(cuda.uuid(at) for at in range(cuda.count())) or 'none'}; name it in "
                "CUDA_VISIBLE_DEVICES, or set stream.memory: pinned"
            )
        if not cuda.can_access(own, index):
            raise UsageError(
                f"the producer's GPU {cuda.uuid(own)} cannot reach the memory of the trainer's GPU {shared['uuid']} "
                "(no peer access): stream.memory: pinned works"
            )
        return cls(cuda, index, cuda.open(index, bytes.fromhex(shared["handle"])), shape, owned=False)

    def of_slot(self, at: int, in_block: np.ndarray | None) -> Any:
        return self._slots[at]

    def copied(self) -> Event:
        return self._cuda.record(self._index)

    def share(self) -> dict[str, Any]:
        handle = self._cuda.export(self._index, self._pointer)
        return {"kind": "cuda", "handle": handle.hex(), "uuid": self._cuda.uuid(self._index)}

    def close(self) -> None:
        """Of the owner's: after every producer that opened it has ended."""
        if not self._slots:
            return
        self._slots = []
        (self._cuda.free if self._owned else self._cuda.close)(self._index, self._pointer)


def attach(
    shared: Mapping[str, Any] | None, memory: Memory, shape: tuple[int, ...], here: str
) -> PinnedImages | DeviceImages | None:
    """A producer's side of what the trainer's `share` said; shape: (slots, B, C, H, W), here: its own device."""
    if shared is None:
        return None
    if shared["kind"] == "pinned":
        return PinnedImages(memory, here, required=shared["required"])
    return DeviceImages.attach(shared, shape, here)


def slot_nbytes(image_shape: tuple[int, ...]) -> int:
    return -(-math.prod(image_shape) // _ALIGNMENT) * _ALIGNMENT


def require(cuda: Cuda, index: int, nbytes: int) -> None:
    """Raise MemoryTooSmall unless so many bytes are free on a GPU."""
    free = cuda.free_nbytes(index)
    if nbytes > free:
        raise MemoryTooSmall(f"the ring needs {human(nbytes)}, but only {human(free)} are free on GPU {index}; {_HELP}")


_HELP = "what helps: a smaller stream.batch_size or stream.in_flight, or stream.memory: pinned"

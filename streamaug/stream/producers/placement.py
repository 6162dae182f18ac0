"""Which device each producer runs on, and where, for that, the slots of its ring live."""

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from streamaug.config import StreamConfig
from streamaug.errors import UsageError, nearest
from streamaug.stream.producers.backends import Work
from streamaug.stream.ring import Layout, memory
from streamaug.stream.ring.cuda import Cuda, connect
from streamaug.stream.ring.memory import Memory
from streamaug.stream.ring.pixels import DeviceImages, Images, PinnedImages, require, slot_nbytes

log = logging.getLogger("streamaug")

Kind = Literal["host", "pinned", "cuda"]


@dataclass(frozen=True)
class Sides:
    """Who writes and who reads: "cpu", "cuda" or "cuda:1", by the trainer's numbering."""

    backend: str
    producers: tuple[str, ...]
    trainer: str
    shared: bool = False  # the producers serve other ranks too

    @property
    def producer_on_gpu(self) -> bool:
        return any(device != "cpu" for device in self.producers)

    @property
    def trainer_on_gpu(self) -> bool:
        return self.trainer != "cpu"

    def __str__(self) -> str:
        return f"producer on {', '.join(dict.fromkeys(self.producers))}, trainer on {self.trainer}"


class Placement:
    """The devices of one fleet. `layout` is the ring's, with images apart where they live on a GPU."""

    def __init__(
        self, config: StreamConfig, backend: str, layout: Layout, work: Work, trainer: str, *, shared: bool = False
    ):
        """trainer: the device on which it takes images. Raises UsageError for what cannot be had."""
        uses_cuda = work.device != "cpu" or trainer != "cpu"
        self._cuda = connect() if uses_cuda else None
        self._config = config
        if trainer != "cpu" and self._cuda is not None and not self._cuda.count():
            raise UsageError(f"stream.deliver_on is {trainer}, but torch finds no usable GPU; cpu works")
        chosen = _dealt_out(config.devices, work.device, backend, config.producers, self._cuda)
        self.sides = Sides(backend, chosen, trainer, shared)
        self.kind = choose(config.memory, self.sides, self._cuda)
        self.layout = replace(layout, images_apart=self.kind == "cuda")
        nbytes = config.producers * self.layout.nbytes
        self.host: memory.Kind = "private" if backend == "local" else memory.choose(config.memory, nbytes)

    def work(self, work: Work, at: int) -> Work:
        """`work` as producer `at` does it: on its own device, with a GPU's environment set before import."""
        environment = dict(work.environment)
        if self._cuda is None or self.sides.producers[at] == "cpu":
            if work.device == "auto":
                environment["CUDA_VISIBLE_DEVICES"] = ""
            return replace(work, device="cpu", environment=environment)
        if self.sides.backend == "process":
            environment.setdefault("CUDA_MPS_CLIENT_PRIORITY", "1")  # below the trainer, where NVIDIA MPS shares a GPU
        if not self._config.devices:
            return replace(work, device=self.sides.producers[at], environment=environment)
        seen = [self.sides.producers[at], *([self.sides.trainer] if self.kind == "cuda" else [])]
        indices = dict.fromkeys(self._cuda.index(device) for device in seen)
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(_name_of(index) for index in indices)
        return replace(work, device="cuda", environment=environment)

    def sees_gpus(self, work: Work) -> bool:
        """Whether any producer might use a GPU, meant or not."""
        done = (self.work(work, at) for at in range(self._config.producers))
        return any(each.environment.get("CUDA_VISIBLE_DEVICES") != "" for each in done)

    def require(self, nbytes: int, what: str) -> None:
        """Raise MemoryTooSmall unless the rings fit where they are to live; nbytes: on the host."""
        memory.require(self.host, nbytes, what)
        if self.kind == "cuda" and self._cuda is not None:
            shape = self.layout.images_shape
            needed = self._config.producers * shape[0] * slot_nbytes(shape[1:])
            require(self._cuda, self._cuda.index(self.sides.trainer), needed)

    def images(self, block: Memory) -> Images | None:
        """The trainer's side of where a ring's images live; None for simply in its block."""
        if self.kind == "cuda":
            return DeviceImages.allocate(self.sides.trainer, self.layout.images_shape)
        if self.kind == "pinned":
            producer = self.sides.producers[0] if self.sides.backend == "local" else "cpu"
            here = self.sides.trainer if self.sides.trainer_on_gpu else producer
            return PinnedImages(block, here, required=self._config.memory == "pinned")
        return None

    def new_images(self, shape: tuple[int, ...]) -> Any:
        """Room for images where the trainer takes them: a uint8 array, or a tensor on its GPU."""
        if self._cuda is None or not self.sides.trainer_on_gpu:
            return np.empty(shape, np.uint8)
        return self._cuda.empty(self._cuda.index(self.sides.trainer), shape)

    def __str__(self) -> str:
        where = {
            "host": f"the host's memory ({self.host})",
            "pinned": f"pinned host memory ({self.host})",
            "cuda": f"the memory of GPU {self.sides.trainer}",
        }[self.kind]
        return f"slots live in {where}: {self.sides} (stream.memory: {self._config.memory})"


def choose(setting: str, sides: Sides, cuda: Cuda | None) -> Kind:
    """What stream.memory means for these sides; `cuda`: None where neither is on a GPU.

    auto: a GPU's memory where both sides are on GPUs that reach each other, pinned where one is on a GPU, else the
    host's. Raises UsageError for a kind that cannot be had.
    """
    if setting not in ("auto", "pinned", "cuda"):
        return "host"
    if cuda is None or not (sides.producer_on_gpu or sides.trainer_on_gpu):
        if setting == "auto":
            return "host"
        raise UsageError(f"stream.memory is {setting}, but no side is on a GPU ({sides}); auto and memfd work")
    obstacle = _obstacle(sides, cuda)
    if setting == "cuda" and obstacle is not None:
        raise UsageError(f"stream.memory is cuda, but {obstacle}; auto and pinned work")
    return "pinned" if setting == "pinned" or obstacle is not None else "cuda"


def _obstacle(sides: Sides, cuda: Cuda) -> str | None:
    """What stands against images in the trainer's GPU."""
    if not (sides.trainer_on_gpu and sides.producer_on_gpu):
        return f"it needs both sides on a GPU ({sides})"
    if sides.backend == "process" and sys.platform != "linux":
        return f"{sys.platform} shares no GPU memory between processes"
    if sides.shared:
        return "producers that ranks share (stream.shared) do not see every rank's GPU"
    trainer = cuda.index(sides.trainer)
    for device in dict.fromkeys(sides.producers):
        if not cuda.can_access(cuda.index(device), trainer):
            return (
                f"GPU {cuda.index(device)} of the producer cannot reach the memory of GPU {trainer} of the trainer "
                "(no peer access)"
            )
    return None


def _dealt_out(
    devices: Sequence[int | str], of_model: str, backend: str, producers: int, cuda: Cuda | None
) -> tuple[str, ...]:
    """The device of each producer: stream.devices in turn, or the model's."""
    there = 0 if cuda is None else cuda.count()
    if not devices:
        device = of_model if of_model != "auto" else "cuda" if there else "cpu"
        return (device,) * producers
    if cuda is None or there == 0 or of_model == "cpu":
        why = "torch finds no usable GPU" if of_model != "cpu" else "the model runs on the CPU"
        raise UsageError(
            f"stream.devices names GPUs, but model.device is {of_model} and {why}: leave stream.devices empty, or set "
            "model.device: cuda"
        )
    if of_model not in ("auto", "cuda"):
        raise UsageError(
            f"stream.devices and model.device ({of_model}) both choose a GPU: set model.device: cuda, which is then "
            "each producer's own"
        )
    if backend == "local":
        raise UsageError("stream.devices needs producers that are processes: set stream.backend: process")
    if len(devices) > producers:
        log.warning(
            "stream.devices names %d GPUs for %d producers: set stream.producers=%d to use them all",
            *(len(devices), producers, len(devices)),
        )
    indices = [_index_of(device, cuda, there) for device in devices]
    return tuple(f"cuda:{indices[at % len(indices)]}" for at in range(producers))


def _index_of(device: int | str, cuda: Cuda, there: int) -> int:
    if isinstance(device, int):
        if device < there:
            return device
        raise UsageError(
            f"stream.devices names GPU {device}, but there are {there}: accepted are 0 to {there - 1}"
            if there > 1
            else f"stream.devices names GPU {device}, but there is only GPU 0"
        )
    uuids = [cuda.uuid(index) for index in range(there)]
    for index, uuid in enumerate(uuids):
        if _bare(uuid) == _bare(device):
            return index
    raise UsageError(
        f"stream.devices names {device}, which is none of the GPUs here: {', '.join(uuids)}{nearest(device, uuids)}"
    )


def _bare(uuid: str) -> str:
    """Drivers write a prefix, torch does not."""
    return uuid.removeprefix("GPU-").removeprefix("MIG-").lower()


def _name_of(index: int) -> str:
    """What CUDA_VISIBLE_DEVICES calls the trainer's GPU `index` in a process that has the trainer's environment."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return str(index) if not visible else visible.split(",")[index].strip()

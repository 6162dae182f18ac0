"""DALI's own PyTorch iterators (DALIGenericIterator, DALIClassificationIterator) as the real side of a StreamLoader.

Imports DALI only where there is such an iterator.
"""

import logging
import time
from collections.abc import Iterator
from typing import Any

import torch

from streamaug.errors import StateError, UsageError
from streamaug.loader.real import RealEpochs

logger = logging.getLogger("streamaug")

ONE_PIPELINE = (
    "give each GPU a process of its own (torchrun), whose iterator is over one pipeline with shard_id=rank and "
    "num_shards=world_size"
)


class DALIEpochs(RealEpochs):
    """Epochs of one DALI iterator, as DALI ends and resets them, and its place in them.

    A pipeline with enable_checkpointing=True is resumed by DALI's own checkpoint, exactly and anywhere. DALI restores a
    pipeline while it builds it, so the iterator gets another one of the same definition.

    Without it there is no way back but to read again: each epoch's order and draws follow from all epochs before it. A
    state inside an epoch then needs a fixed seed, and all batches read before it are read again. A state between epochs
    reads nothing, and what a resumed run reads is in the order of a new iterator.

    As without the wrapper, an epoch that was left by `break` goes on in the next loop.

    Raises UsageError for an iterator over several pipelines, StateError for a state inside an epoch that could not be
    found again, or of another kind of pipeline.
    """

    kind = "dali"

    def __init__(self, loader: Any):
        super().__init__(loader)
        pipelines = getattr(loader, "_num_gpus", 1)
        if pipelines > 1:
            raise UsageError(
                f"the DALI iterator is over {pipelines} pipelines and delivers a batch of each; accepted is one: "
                + ONE_PIPELINE
            )
        self._read = 0  # batches of all epochs

    def length(self) -> int:
        batches = len(self.loader)
        if batches < 1:  # DALI says 0 without a reader_name or a size
            raise TypeError(
                f"this {type(self.loader).__name__} has no length: it was built without reader_name= and size="
            )
        return batches

    def images(self) -> tuple[int, int]:
        batches, size = self.length(), self.loader.batch_size
        if self.loader._last_batch_policy.name != "PARTIAL":
            return batches * size, size
        if not self.loader._reader_name:
            return self.loader.size, size
        return int(self.loader._shard_sizes_per_gpu_initial[self.loader._shards_id[0]]), size

    def _counted(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in super()._counted(batches):
            self._read += 1
            yield batch

    @property
    def _pipeline(self) -> Any:
        return self.loader._pipes[0]

    @property
    def _has_checkpoints(self) -> bool:
        """Whether DALI keeps the state; it does not of sources written in Python, and restores no such pipeline."""
        return self.loader._enable_checkpointing and not self._pipeline._input_callbacks

    def state_dict(self) -> dict[str, Any]:
        if self.has_state or self._resume is not None:
            return super().state_dict()
        over = self.finished or self._read_whole()
        if self._has_checkpoints:
            checkpoint = torch.frombuffer(bytearray(self.loader.checkpoints()[0]), dtype=torch.uint8)
            return {"pulled": self.pulled, "finished": self.finished, "checkpoint": checkpoint}
        if over or not self.pulled:
            return {"pulled": self.pulled, "finished": over}
        if self._pipeline.seed is None:
            raise StateError(
                f"{self.pulled} batches of the epoch were read, and this DALI iterator cannot be resumed inside an "
                "epoch: give its pipeline enable_checkpointing=True, which resumes anywhere (or a seed=, with which "
                "everything is read again), save between epochs, or use sa.DALIStreamLoader(pipeline_function, stream)"
            )
        return {"pulled": self.pulled, "finished": False, "read": self._read, "seed": self._pipeline.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.has_state:
            return super().load_state_dict(state)
        if "checkpoint" in state:
            if not self._has_checkpoints:
                raise StateError(
                    "the state holds a checkpoint of DALI's and this iterator's pipeline was built without "
                    "enable_checkpointing=True: build it as it was when the state was saved"
                )
            self._restore(state["checkpoint"].numpy().tobytes(), over=state["finished"])
        elif self._read if "read" in state else self.pulled and not (self.finished or self._read_whole()):
            raise StateError(
                f"the DALI iterator has read {self._read} batches and cannot go back: load the state into a "
                "StreamLoader around a new iterator"
            )
        if state.get("seed", self._pipeline.seed) != self._pipeline.seed:
            raise StateError(
                f"seed of the DALI pipeline was {state['seed']} when the state was saved and is {self._pipeline.seed} "
                "now: what was read cannot be read again"
            )
        super().load_state_dict(state)

    def leave_resumed_epoch(self) -> None:
        if self._resume is None or not {"checkpoint", "read"} & self._resume.keys():
            return super().leave_resumed_epoch()
        if self._resume["pulled"]:
            for _ in self._continued(self._resume):
                self._read += 1
            self._resume, self.pulled = None, 0

    def _read_whole(self) -> bool:
        """Whether the batch read last was the last of the epoch, which the iterator has not said yet."""
        return 0 < len(self.loader) <= self.pulled

    def _restore(self, checkpoint: bytes, over: bool) -> None:
        """Put the iterator where the checkpoint was made. over: the epoch, which it has said."""
        from nvidia.dali import Pipeline

        old = self._pipeline
        restored = Pipeline(
            batch_size=old.max_batch_size,
            num_threads=old.num_threads,
            device_id=old.device_id,
            seed=old.seed,
            exec_pipelined=old.exec_pipelined,
            exec_async=old.exec_async,
            exec_dynamic=old.exec_dynamic,
            prefetch_queue_depth=old.prefetch_queue_depth,
            set_affinity=old.set_affinity,
            enable_checkpointing=True,
            checkpoint=checkpoint,
        )
        restored.deserialize_and_build(old.serialize())
        loader = self.loader
        loader._pipes = [restored]
        loader._initial_checkpoints = [checkpoint]
        loader._restore_state(restored._iterator_data)
        loader._first_batch = None
        loader._ever_scheduled = False
        loader._ever_consumed = over  # an iterator at its end begins the next epoch where it has been read

    def _continued(self, resume: dict[str, Any]) -> Iterator[Any]:
        if self.has_state:
            return super()._continued(resume)
        self.pulled = resume["pulled"]
        if "read" in resume:
            return self._again(resume["read"])
        over = resume["finished"]
        if "checkpoint" not in resume:
            over = over or self._read_whole()
            logger.warning(
                "the DALI iterator begins its shuffling and its random operators anew: the state of a StreamLoader "
                "does not hold them; a pipeline with enable_checkpointing=True, or sa.DALIStreamLoader, keeps them"
            )
        return iter(()) if over else iter(self.loader)

    def _again(self, count: int) -> Iterator[Any]:
        """The rest of the epoch after `count` batches, over the ends of epochs."""
        logger.warning(
            "resuming in mid-epoch: %d batches are read again, all since the first epoch; a pipeline with "
            "enable_checkpointing=True resumes without",
            count,
        )
        began = time.perf_counter()
        batches, epoch_began = iter(self.loader), 0
        while self._read < count:
            if next(batches, None) is not None:
                self._read += 1
            elif self._read > epoch_began:
                batches, epoch_began = iter(self.loader), self._read
            else:
                raise StateError(
                    f"{count} batches were to be read again, and the DALI iterator ended after {self._read}"
                )
        logger.warning("reading %d batches again took %.1f s", count, time.perf_counter() - began)
        return batches


def epochs_of(loader: Any) -> RealEpochs:
    """The real side of a StreamLoader around `loader`, which may be a subclass of one of DALI's iterators."""
    dali = any(base.__module__.startswith("nvidia.dali.plugin") for base in type(loader).__mro__)
    return DALIEpochs(loader) if dali else RealEpochs(loader)

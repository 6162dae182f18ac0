"""DALI's own PyTorch iterators (DALIGenericIterator, DALIClassificationIterator) as the real side of a StreamLoader.

Imports nothing of DALI: whoever has such an iterator has it.
"""

import logging
from collections.abc import Iterator
from typing import Any

from streamaug.errors import StateError, UsageError
from streamaug.loader.real import RealEpochs

logger = logging.getLogger("streamaug")

ONE_PIPELINE = (
    "give each GPU a process of its own (torchrun), whose iterator is over one pipeline with shard_id=rank and "
    "num_shards=world_size"
)


class DALIEpochs(RealEpochs):
    """Epochs of one DALI iterator, as DALI ends and resets them.

    A state is saved between epochs only. DALI cannot put an iterator back, and neither can reading batches again: each
    epoch's order and draws follow from all epochs before it. What a resumed run reads is in the order of a new
    iterator. As without the wrapper, an epoch that was left by `break` goes on in the next loop.

    Raises UsageError for an iterator over several pipelines, StateError for a state inside an epoch.
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

    def state_dict(self) -> dict[str, Any]:
        if self.has_state or self._resume is not None:
            return super().state_dict()
        over = self.finished or self._read_whole()
        if self.pulled and not over:
            raise StateError(
                f"{self.pulled} batches of the epoch were read, and a DALI iterator cannot be resumed inside an epoch: "
                "save between epochs, or use sa.DALIStreamLoader(pipeline_function, stream), which resumes anywhere"
            )
        return {"pulled": self.pulled, "finished": over}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not self.has_state and self.pulled and not (self.finished or self._read_whole()):
            raise StateError(
                f"the DALI iterator has read {self.pulled} batches of an epoch and cannot go back: load the state into "
                "a StreamLoader around a new iterator"
            )
        super().load_state_dict(state)

    def _read_whole(self) -> bool:
        """Whether the batch read last was the last of the epoch, which the iterator has not said yet."""
        return 0 < len(self.loader) <= self.pulled

    def _continued(self, resume: dict[str, Any]) -> Iterator[Any]:
        if self.has_state:
            return super()._continued(resume)
        logger.warning(
            "the DALI iterator begins its shuffling and its random operators anew: the state of a StreamLoader does "
            "not hold them; sa.DALIStreamLoader keeps them"
        )
        self.pulled = resume["pulled"]
        return iter(()) if resume["finished"] else iter(self.loader)


def epochs_of(loader: Any) -> RealEpochs:
    """The real side of a StreamLoader around `loader`, which may be a subclass of one of DALI's iterators."""
    dali = any(base.__module__.startswith("nvidia.dali.plugin") for base in type(loader).__mro__)
    return DALIEpochs(loader) if dali else RealEpochs(loader)

"""The real side of a StreamLoader: one epoch of the wrapped loader after another, and resuming inside one.

A loader with its own state (torchdata's StatefulDataLoader or nodes.Loader) is resumed by it. Any other, and one whose
epoch another number of ranks had begun, is fast-forwarded: the random state that the epoch began with is put back, so
that the same permutation is drawn, and the batches already read are skipped.
"""

import logging
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler

from streamaug.errors import UsageError
from streamaug.loader.order import accelerated, described, images_per_batch, order_of, samplers

logger = logging.getLogger("streamaug")

_LONG_RESUME = 5.0  # seconds of reading again from which a resume is worth a warning

RandomState = dict[str, torch.Tensor]


class RealEpochs:
    """Iterates `loader` and knows how many batches of the current epoch were read (`pulled`).

    A fast-forwarded loader without a `generator=` of its own draws from torch's global CPU generator;
    resuming it sets that generator to what it was when the state was saved.
    """

    kind = "plain"  # of the state that it saves

    def __init__(self, loader: Any):
        self.loader = loader
        # A loader that Accelerate prepared has both methods whatever it wraps, and says itself whether they work.
        self.has_state = getattr(loader, "use_stateful_dataloader", True) and all(
            callable(getattr(loader, name, None)) for name in ("state_dict", "load_state_dict")
        )
        if self.has_state:
            self.kind = "stateful"
        self.pulled = 0
        self.finished = False
        self._began: RandomState = {}
        self._resume: dict[str, Any] | None = None

    def length(self) -> int:
        """Batches in an epoch. Raises TypeError for a loader that cannot tell."""
        return len(self.loader)

    def images(self) -> tuple[int, int]:
        """(images in an epoch, images per batch). Raises TypeError for a loader that cannot tell."""
        size: Any = getattr(self.loader, "batch_size", None)
        sampler: Any = getattr(self.loader, "sampler", None)
        if type(getattr(self.loader, "batch_sampler", None)) is BatchSampler:
            size, sampler = self.loader.batch_sampler.batch_size, self.loader.batch_sampler.sampler
        if not size or not hasattr(sampler, "__len__"):
            raise TypeError(
                'the length under displaced="defer" follows from the batch_size and the length of the sampler; '
                f"this {type(self.loader).__name__} lacks them"
            )
        return (self.length() * size if getattr(self.loader, "drop_last", False) else len(sampler)), size

    def epoch(self) -> Iterator[Any]:
        """Start the next epoch, or the rest of the one in which a loaded state was saved."""
        resume, self._resume = self._resume, None
        self.pulled, self.finished = 0, False
        if resume is None:
            self._began = self._random_state()
            return self._counted(iter(self.loader))
        return self._counted(self._continued(resume))

    def _counted(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self.pulled += 1
            yield batch
        if self.pulled == 0 and isinstance(self.loader, Iterator):
            raise UsageError(
                f"the real loader is an iterator ({type(self.loader).__name__}) that was read to its end, and there is "
                "no next epoch in it: pass the loader or the list that it was made of"
            )
        self.finished = True

    def close_epoch(self) -> None:
        """The epoch was delivered to its end: a state saved from now on starts the next."""
        self.pulled, self.finished = 0, False

    def state_dict(self) -> dict[str, Any]:
        """Random states are under "tensors"; a loader's own state is under "loader" as it came."""
        if self._resume is not None:
            return self._resume
        # A loader that Accelerate prepared knows the last batch when it yields it, and counts epochs to shuffle by.
        at_end = bool(self.pulled and not self.finished and getattr(self.loader, "end_of_dataloader", False))
        state: dict[str, Any] = {
            "pulled": self.pulled,
            "finished": self.finished or at_end,
            "order": order_of(self.loader),
            "rows": images_per_batch(self.loader),
        }
        if isinstance(getattr(self.loader, "iteration", None), int):
            state["iteration"] = self.loader.iteration + at_end
        if self.has_state:
            return state | {"loader": self.loader.state_dict()}
        tensors = {f"now_{name}": value for name, value in self._random_state().items()}
        if self.pulled:
            tensors |= {f"began_{name}": value for name, value in self._began.items()}
        return state | {"tensors": tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["pulled"] and not state["finished"] and state.get("order") != order_of(self.loader):
            logger.warning(
                "the order of the real images was %s when the state was saved and is %s now: in the rest of this epoch "
                "some come a second time and some not at all",
                state.get("order") or "another one",
                described(self.loader),
            )
        if "loader" in state:
            self.loader.load_state_dict(state["loader"])
        if "iteration" in state:
            self.loader.iteration = state["iteration"]
        self._resume = state

    def leave_resumed_epoch(self) -> None:
        """The next epoch begins afresh, with the random state that was loaded."""
        if self._resume is None:
            return
        if "loader" in self._resume and not self._resume["finished"]:
            iter(self.loader)  # takes up the position that was loaded; the next one starts an epoch
        self._resume = {**self._resume, "pulled": 0, "finished": False}

    def _continued(self, resume: dict[str, Any]) -> Iterator[Any]:
        self.pulled = resume["pulled"]
        if "loader" in resume:
            return iter(()) if resume["finished"] else iter(self.loader)
        if self.has_state and accelerated(self.loader):
            iter(self.loader.base_dataloader)  # takes up the position of a former rank, which Accelerate has loaded
        now, self._began = _named(resume["tensors"], "now_"), _named(resume["tensors"], "began_")
        if resume["finished"]:
            self._set_random_state(now)
            return iter(())
        if self.pulled == 0:
            self._set_random_state(now)
            self._began = self._random_state()
            return iter(self.loader)
        self._set_random_state(self._began)
        batches = self._skip(self.pulled)
        # The loader's own generators have advanced by themselves, as they did the first time.
        self._set_random_state({name: value for name, value in now.items() if name == "global"})
        return batches

    def _skip(self, count: int) -> Iterator[Any]:
        began = time.perf_counter()
        batches = iter(self.loader)
        for _ in range(count):
            next(batches, None)
        seconds = time.perf_counter() - began
        logger.log(
            logging.WARNING if seconds > _LONG_RESUME else logging.INFO,
            "resumed in mid-epoch by reading the first %d batches of the epoch again, which took %.1f s; %s",
            count,
            seconds,
            "a resume by as many ranks as before does not need it"
            if self.has_state
            else "with torchdata's StatefulDataLoader in place of DataLoader they are not read again",
        )
        return batches

    def _generators(self) -> dict[str, torch.Generator]:
        """What the loader draws from: its own generators, and torch's global one where it has none."""
        own = getattr(self.loader, "generator", None)
        found = {"global": torch.default_generator} if own is None else {"loader": own}
        for sampler in samplers(self.loader):
            generator = getattr(sampler, "generator", None)
            if isinstance(generator, torch.Generator) and generator is not own:
                found["sampler"] = generator
        return found

    def _random_state(self) -> RandomState:
        return {name: generator.get_state() for name, generator in self._generators().items()}

    def _set_random_state(self, states: RandomState) -> None:
        generators = self._generators()
        for name, value in states.items():
            if name in generators:
                generators[name].set_state(value)


def _named(tensors: RandomState, prefix: str) -> RandomState:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

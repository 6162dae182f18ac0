"""Lightning: a callback that gives a StreamLoader what Lightning gives a DataLoader, and the stream a clean end."""

import math
import os
from collections.abc import Mapping
from functools import wraps
from typing import Any

import torch
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from streamaug.errors import MissingExtra, UsageError
from streamaug.loader.ranks import RANKS_KEY, gather_state
from streamaug.loader.stream_loader import StreamLoader

try:
    import lightning.pytorch as pl
    from lightning.pytorch.trainer.connectors.data_connector import _resolve_overfit_batches
    from lightning.pytorch.trainer.states import RunningStage
    from lightning.pytorch.utilities import CombinedLoader
    from lightning.pytorch.utilities.data import _update_dataloader
except ImportError:
    raise MissingExtra("lightning", "integrations") from None


class StreamCallback(pl.Callback):
    """For a LightningModule or DataModule whose `train_dataloader` returns a StreamLoader (alone or among others).

        trainer = Trainer(callbacks=[StreamCallback()])

    Without it a run in one process trains; the callback adds:

    - resuming: Lightning alone restores a loader inside an epoch only, and not where `configure_optimizers` asks for
      `trainer.estimated_stepping_batches`, which makes the loader before the checkpoint is read;
    - several ranks: the real DataLoader gets its DistributedSampler, as a bare one would, and checkpoints hold every
      rank's state, which another number of ranks can load;
    - any_ranks=True: one process shuffles as several do, by a DistributedSampler, so that several can resume what it
      saved inside an epoch (what it saved at the end of an epoch they always can);
    - `overfit_batches`: the real DataLoader is made sequential (set ratio=0 to overfit on real images alone);
    - feedback: where `training_step` returns a dict with `losses_key` (float [n], one per image of the batch), the
      stream hears of it and orders more of what is hard;
    - logging every `log_every_n_steps` of the Trainer: the synthetic share, seconds waited, acceptance;
    - the end of the producers with the fit, however it ends (close=False leaves the stream open for another fit).
    """

    def __init__(self, *, losses_key: str = "losses", log: bool = True, close: bool = True, any_ranks: bool = False):
        self.losses_key = losses_key
        self.log = log
        self.close = close
        self.any_ranks = any_ranks
        self.loaders: list[StreamLoader] = []
        self._states: list[Any] = []  # of the loaders in a checkpoint that is being resumed
        self._saved_by: int | None = None  # the number of ranks, where it is another one now

    # Before Lightning looks at the loaders.

    def setup(self, trainer: Any, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        source, strategy = trainer.fit_loop._data_source, trainer.strategy
        request, process, set_up = source.dataloader, strategy.process_dataloader, trainer.fit_loop.setup_data

        @wraps(request)
        def requested() -> Any:
            given = request()
            self.loaders = _stream_loaders(given)
            if trainer.overfit_batches > 0:
                _each_real(self.loaders, _sequential)
            return given

        @wraps(process)
        def processed(dataloader: Any) -> Any:
            if isinstance(dataloader, StreamLoader):
                dealt = self.any_ranks or any(map(_was_dealt, self._states))
                _each_real([dataloader], lambda real: _for_this_rank(trainer, real, dealt))
            return process(dataloader)

        @wraps(set_up)
        def all_set_up() -> None:
            set_up()
            if self._saved_by is not None and trainer.fit_loop._combined_loader is not None:
                self._deal_anew(trainer)

        source.dataloader = requested  # type: ignore[method-assign]
        strategy.process_dataloader = processed  # type: ignore[method-assign]
        trainer.fit_loop.setup_data = all_set_up  # type: ignore[method-assign]

    def _deal_anew(self, trainer: Any) -> None:
        """Share out what another number of ranks saved, and let Lightning count batches from there."""
        progress, batches = trainer.fit_loop.epoch_loop.batch_progress, trainer.num_training_batches
        before = progress.current.ready
        now = -(-before * self._saved_by // trainer.world_size)
        loaders = _stateful(trainer)
        for loader, state in zip(loaders, self._states, strict=True):
            if isinstance(loader, StreamLoader):
                loader.load_state_dict(_read_whole(state) if progress.is_last_batch else state)
                if state[RANKS_KEY][0]["batch"] == before:
                    now = loader.state_dict()["batch"]
            else:
                loader.load_state_dict(state)
        if batches < math.inf:
            now = batches if progress.is_last_batch else min(now, batches)
            progress.is_last_batch = now == batches
        for count in ("ready", "started", "processed", "completed"):
            setattr(progress.current, count, getattr(progress.current, count) + now - before)
        self._states, self._saved_by = [loader.state_dict() for loader in loaders], None

    # While it trains.

    def on_train_start(self, trainer: Any, pl_module: pl.LightningModule) -> None:
        """Lightning itself restores loaders in mid-epoch only; the stream goes on after an epoch as well."""
        states, self._states = self._states, []
        epoch_is_over = trainer.fit_loop.epoch_loop.batch_progress.current.ready >= trainer.num_training_batches
        for loader, state in zip(_stateful(trainer), states, strict=False):
            if isinstance(loader, StreamLoader):
                loader.load_state_dict(state)
                if epoch_is_over:
                    loader.end_resumed_epoch()

    def on_train_batch_end(
        self, trainer: Any, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(outputs, dict) and self.losses_key in outputs:
            self._feed_back(outputs[self.losses_key], batch)
        if self.log and trainer.log_every_n_steps and trainer.global_step % trainer.log_every_n_steps == 0:
            for number, loader in enumerate(self.loaders):
                name = "stream" if len(self.loaders) == 1 else f"stream_{number}"
                pl_module.log_dict({f"{name}/{key}": value for key, value in _figures(loader).items()})

    def _feed_back(self, losses: torch.Tensor, batch: Any) -> None:
        if len(self.loaders) != 1:
            raise UsageError(
                f"training_step returns {self.losses_key!r}, and {len(self.loaders)} StreamLoaders could be meant; "
                "call stream.feedback(labels, losses) in training_step instead"
            )
        loader = self.loaders[0]
        labels, ids = loader.labels_and_ids(batch)
        if len(losses) != len(labels):
            raise UsageError(f"{self.losses_key!r} has {len(losses)} values for a batch of {len(labels)} images")
        loader.stream.feedback(labels, losses.detach(), ids)

    # State and end.

    def on_save_checkpoint(self, trainer: Any, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Lightning saves the loaders' states of rank 0 for all."""
        if trainer.world_size > 1 and self.loaders:
            loop = checkpoint["loops"]["fit_loop"]["state_dict"]
            loop["combined_loader"] = [
                gather_state(state) if isinstance(loader, StreamLoader) else state
                for loader, state in zip(_stateful(trainer), loop["combined_loader"], strict=True)
            ]

    def on_load_checkpoint(self, trainer: Any, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        loop = checkpoint["loops"]["fit_loop"]["state_dict"]
        self._states = loop.get("combined_loader", [])
        saved_by = {_ranks_of(state) for state in self._states if _is_ours(state)}
        if saved_by and saved_by != {trainer.world_size}:
            self._saved_by = saved_by.pop()
            self._states = [
                {RANKS_KEY: [state]} if _is_ours(state) and RANKS_KEY not in state else state for state in self._states
            ]
            loop["combined_loader"] = []  # loaded once the length of the epoch is known

    def teardown(self, trainer: Any, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._close()

    def on_exception(self, trainer: Any, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        for loader in self.loaders if self.close else []:
            loader.close()
            loader.stream.close()


def _stream_loaders(loaders: Any) -> list[StreamLoader]:
    combined = loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders)
    return [loader for loader in combined.flattened if isinstance(loader, StreamLoader)]


def _stateful(trainer: Any) -> list[Any]:
    """The training loaders whose states a checkpoint holds, in their order."""
    return [loader for loader in trainer.fit_loop._combined_loader.flattened if hasattr(loader, "state_dict")]


def _each_real(loaders: list[StreamLoader], change: Any) -> None:
    for loader in loaders:
        real = loader.real_loader
        if isinstance(real, DataLoader) and (changed := change(real)) is not real:
            loader.rewrap(changed)


def _sequential(real: DataLoader) -> Any:
    combined = CombinedLoader(real)
    _resolve_overfit_batches(combined, RunningStage.TRAINING)
    return combined.flattened[0]


def _for_this_rank(trainer: Any, real: DataLoader, dealt: bool) -> Any:
    """`dealt`: one process gets the DistributedSampler as well that Lightning gives each of several."""
    if trainer.world_size > 1 or not dealt or type(real.sampler) not in (RandomSampler, SequentialSampler):
        return trainer._data_connector._prepare_dataloader(real, shuffle=True, mode=RunningStage.TRAINING)
    seed = int(os.environ.get("PL_GLOBAL_SEED", 0))  # as Lightning's own
    sampler: DistributedSampler = DistributedSampler(real.dataset, 1, 0, shuffle=not trainer.overfit_batches, seed=seed)
    return _update_dataloader(real, sampler, mode=RunningStage.TRAINING)


def _is_ours(state: Mapping[str, Any]) -> bool:
    return RANKS_KEY in state or {"identity", "real", "stream"} <= state.keys()


def _ranks_of(state: Mapping[str, Any]) -> int:
    return len(state[RANKS_KEY]) if RANKS_KEY in state else (state["stream"] or {}).get("world_size", 1)


def _read_whole(state: Mapping[str, Any]) -> dict[str, Any]:
    """Of an epoch that is over: what a limit of Lightning's left unread is not asked for any more."""
    return {RANKS_KEY: [one | {"real": one["real"] and one["real"] | {"finished": True}} for one in state[RANKS_KEY]]}


def _was_dealt(state: Mapping[str, Any]) -> bool:
    """Whether a DistributedSampler drew the real images of a StreamLoader's state."""
    if not _is_ours(state):
        return False
    first = state[RANKS_KEY][0] if RANKS_KEY in state else state
    return str((first["real"] or {}).get("order")).startswith("DistributedSampler")


def _figures(loader: StreamLoader) -> dict[str, float]:
    stats, stream = loader.stats(), loader.stream.stats()
    return {
        "share": stats.realised_ratio,
        "stall_seconds": stream.stall_seconds,
        "acceptance": stream.acceptance,
        "images_per_second": stream.images_per_second,
    }

"""Lightning: a callback that gives a StreamLoader what Lightning gives a DataLoader, and the stream a clean end."""

import logging
from functools import wraps
from typing import Any

import torch

from streamaug.errors import MissingExtra, StateError, UsageError
from streamaug.loader.ranks import RANKS_KEY, gather_state
from streamaug.loader.stream_loader import StreamLoader

try:
    import lightning.pytorch as pl
    from lightning.pytorch.trainer.connectors.data_connector import _resolve_overfit_batches
    from lightning.pytorch.trainer.states import RunningStage
    from lightning.pytorch.utilities import CombinedLoader
except ImportError:
    raise MissingExtra("lightning", "integrations") from None

logger = logging.getLogger("streamaug")


class StreamCallback(pl.Callback):
    """For a LightningModule or DataModule whose `train_dataloader` returns a StreamLoader (alone or among others).

        trainer = Trainer(callbacks=[StreamCallback()])

    Without it a run in one process works and resumes; the callback adds:

    - several ranks: the real DataLoader gets its DistributedSampler, as a bare one would, and checkpoints hold every
      rank's state;
    - `overfit_batches`: the real DataLoader is made sequential (set ratio=0 to overfit on real images alone);
    - feedback: where `training_step` returns a dict with `losses_key` (float [n], one per image of the batch), the
      stream hears of it and orders more of what is hard;
    - logging every `log_every_n_steps` of the Trainer: the synthetic share, seconds waited, acceptance;
    - the end of the producers with the fit, however it ends (close=False leaves the stream open for another fit).
    """

    def __init__(self, *, losses_key: str = "losses", log: bool = True, close: bool = True):
        self.losses_key = losses_key
        self.log = log
        self.close = close
        self.loaders: list[StreamLoader] = []
        self._states: list[Any] = []  # of the loaders in a checkpoint that is being resumed

    # Before Lightning looks at the loaders.

    def setup(self, trainer: Any, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        source, strategy = trainer.fit_loop._data_source, trainer.strategy
        request, process = source.dataloader, strategy.process_dataloader

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
                _each_real([dataloader], lambda real: _for_this_rank(trainer, real))
            return process(dataloader)

        source.dataloader = requested  # type: ignore[method-assign]
        strategy.process_dataloader = processed  # type: ignore[method-assign]

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
        self._states = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])
        for state in self._states:
            saved = len(state[RANKS_KEY]) if RANKS_KEY in state else trainer.world_size
            if saved != trainer.world_size:
                raise StateError(
                    f"the checkpoint was saved by {saved} ranks and is loaded by {trainer.world_size}: Lightning "
                    "counts batches by rank; start as many ranks as before"
                )

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
        if isinstance(real, torch.utils.data.DataLoader) and (changed := change(real)) is not real:
            loader.rewrap(changed)


def _sequential(real: torch.utils.data.DataLoader) -> Any:
    combined = CombinedLoader(real)
    _resolve_overfit_batches(combined, RunningStage.TRAINING)
    return combined.flattened[0]


def _for_this_rank(trainer: Any, real: torch.utils.data.DataLoader) -> Any:
    return trainer._data_connector._prepare_dataloader(real, shuffle=True, mode=RunningStage.TRAINING)


def _figures(loader: StreamLoader) -> dict[str, float]:
    stats, stream = loader.stats(), loader.stream.stats()
    return {
        "share": stats.realised_ratio,
        "stall_seconds": stream.stall_seconds,
        "acceptance": stream.acceptance,
        "images_per_second": stream.images_per_second,
    }

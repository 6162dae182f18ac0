"""The Hugging Face Trainer: its training DataLoader wrapped in a StreamLoader, and the state in its checkpoints."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from streamaug.errors import MissingExtra, UsageError
from streamaug.integrations import files
from streamaug.loader.ranks import RANKS_KEY, at_epoch
from streamaug.loader.stream_loader import StreamLoader

try:
    from transformers import Trainer
    from transformers.trainer_callback import TrainerState
    from transformers.trainer_utils import get_last_checkpoint
except ImportError:
    raise MissingExtra("transformers", "integrations") from None

from streamaug.integrations.accelerate import enable, tell_the_end

if TYPE_CHECKING:
    from streamaug.stream.stream import Stream

    Base = Trainer
else:
    Base = object

AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)
_STATE = "stream_loader"
logger = logging.getLogger("streamaug")


class StreamTrainerMixin(Base):
    """Puts synthetic images into a Trainer's training batches.

        class MyTrainer(StreamTrainerMixin, Trainer): ...

        trainer = MyTrainer(model, args, train_dataset=..., stream=stream, stream_options={"ratio": 0.5})
        trainer.train(resume_from_checkpoint=True)

    stream: the stream to read; None trains on real images only. stream_options: arguments of StreamLoader.
    The Trainer builds the real DataLoader as always (`dataloader_num_workers`, sampler, collator, rank), and
    `stream_loader` is the loader around it once training has begun. Checkpoints get one file a rank, and a resumed
    run goes on with the very next batch. Another number of ranks goes on where the Trainer does, which counts optimizer
    steps: at the same images where an epoch has as many steps as before, and otherwise elsewhere, which is said.
    Sampling by length is refused: images have none. Evaluation is not touched.
    """

    stream: "Stream | None" = None
    stream_options: dict[str, Any]
    stream_loader: StreamLoader | None = None
    _resumed_from: str | None = None

    def __init__(
        self, *args: Any, stream: "Stream | None" = None, stream_options: dict[str, Any] | None = None, **options: Any
    ):
        super().__init__(*args, **options)
        self._take_stream(stream, stream_options or {})

    def _take_stream(self, stream: "Stream | None", options: dict[str, Any]) -> None:
        self.stream = stream
        self.stream_options = options
        enable()

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **options: Any) -> Any:
        folder = resume_from_checkpoint
        self._resumed_from = get_last_checkpoint(self.args.output_dir) if folder is True else (folder or None)
        return super().train(resume_from_checkpoint, *args, **options)

    def get_train_dataloader(self) -> Any:
        if self.stream is None:
            return super().get_train_dataloader()
        _check_sampling(self.args)
        real = super().get_train_dataloader()
        self.stream_loader = StreamLoader(real, self.stream, **self.stream_options)
        tell_the_end(self.accelerator, self.stream_loader, real)
        if self._resumed_from is not None:
            saved = files.load_state(self.stream_loader, self._resumed_from, _STATE)[RANKS_KEY]
            if _length(self.stream_loader) is not None and self.stream_loader.epoch_is_over:
                self.stream_loader.end_resumed_epoch()  # the Trainer goes on with the next
            if saved != self.stream.world_size:
                self._follow_steps(self.stream_loader, Path(self._resumed_from), saved)
        return self.stream_loader

    def _follow_steps(self, loader: StreamLoader, folder: Path, saved: int) -> None:
        """Put the loader where the Trainer will go on, which it finds from the number of optimizer steps alone."""
        done = TrainerState.load_from_json(str(folder / "trainer_state.json")).global_step
        batches = _length(loader) or self.args.max_steps * self.args.gradient_accumulation_steps
        steps = -(-batches // self.args.gradient_accumulation_steps)  # of an epoch
        epoch, batch = done // steps, done % steps * self.args.gradient_accumulation_steps
        state = loader.state_dict()
        if epoch == state["epoch"] and (batch == state["batch"] or self.args.ignore_data_skip):
            return
        logger.log(
            logging.WARNING if loader.stream.rank == 0 else logging.DEBUG,
            "%d ranks saved this checkpoint, and for %d the images that it had reached are those of batch %d of epoch "
            "%d; the Trainer counts optimizer steps (%d, of which an epoch has %d now) and goes on at batch %d of "
            "epoch %d. Where an epoch keeps its number of steps it stays at the same images: change "
            "per_device_train_batch_size or gradient_accumulation_steps with the number of ranks",
            saved,
            loader.stream.world_size,
            state["batch"],
            state["epoch"],
            done,
            steps,
            0 if self.args.ignore_data_skip else batch,
            epoch,
        )
        loader.load_state_dict(at_epoch(state, epoch, epoch * batches))  # the Trainer then skips to the batch

    def _save_rng_state(self, output_dir: str) -> None:
        """Called on every rank for a checkpoint that can be resumed, before the file that makes it complete."""
        super()._save_rng_state(output_dir)
        if self.stream_loader is not None:
            files.save_state(self.stream_loader, output_dir, _STATE)


def _length(loader: StreamLoader) -> int | None:
    try:
        return len(loader)
    except TypeError:
        return None


def _check_sampling(args: Any) -> None:
    strategy = getattr(args, "train_sampling_strategy", "random")
    if strategy not in ("random", "sequential"):
        raise UsageError(
            f"train_sampling_strategy={strategy!r} puts real samples of one length together, and images have none; "
            "set it to 'random' or 'sequential'"
        )


def add_stream(trainer: AnyTrainer, stream: "Stream", **options: Any) -> AnyTrainer:
    """The same trainer, which from now on trains on real and synthetic images. `options` are StreamLoader's.

    trainer = add_stream(trainer, stream, ratio=0.5)
    """
    if not isinstance(trainer, Trainer):
        raise UsageError(
            f"add_stream(trainer, stream): the first argument is a Trainer, got a {type(trainer).__name__}"
        )
    if not isinstance(trainer, StreamTrainerMixin):
        kind = type(trainer)
        trainer.__class__ = type(kind.__name__, (StreamTrainerMixin, kind), {"__module__": kind.__module__})
    trainer._take_stream(stream, options)  # type: ignore[attr-defined]
    return trainer

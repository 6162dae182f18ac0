"""The Hugging Face Trainer: its training DataLoader wrapped in a StreamLoader, and the state in its checkpoints."""

from typing import TYPE_CHECKING, Any, TypeVar

from streamaug.errors import MissingExtra, UsageError
from streamaug.integrations import files
from streamaug.loader.stream_loader import StreamLoader

try:
    from transformers import Trainer
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
_COUNTS_BY_RANK = "the Trainer finds epoch and batch from its number of steps, which counts by rank"


class StreamTrainerMixin(Base):
    """Puts synthetic images into a Trainer's training batches.

        class MyTrainer(StreamTrainerMixin, Trainer): ...

        trainer = MyTrainer(model, args, train_dataset=..., stream=stream, stream_options={"ratio": 0.5})
        trainer.train(resume_from_checkpoint=True)

    stream: the stream to read; None trains on real images only. stream_options: arguments of StreamLoader.
    The Trainer builds the real DataLoader as always (`dataloader_num_workers`, sampler, collator, rank), and
    `stream_loader` is the loader around it once training has begun. Checkpoints get one file a rank, and a resumed
    run goes on with the very next batch; the Trainer counts steps by the number of ranks, so that must stay. Sampling
    by length is refused: images have none. Evaluation is not touched.
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
            files.load_state(self.stream_loader, self._resumed_from, _STATE, same_ranks_because=_COUNTS_BY_RANK)
            if self.stream_loader.epoch_is_over:
                self.stream_loader.end_resumed_epoch()  # the Trainer goes on with the next
        return self.stream_loader

    def _save_rng_state(self, output_dir: str) -> None:
        """Called on every rank for a checkpoint that can be resumed, before the file that makes it complete."""
        super()._save_rng_state(output_dir)
        if self.stream_loader is not None:
            files.save_state(self.stream_loader, output_dir, _STATE)


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

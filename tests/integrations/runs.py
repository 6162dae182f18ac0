"""Short training runs in each framework over a real stream; what arrives is written down batch by batch.

As a script, one rank of several: runs each framework whole, stopped in mid-epoch, and resumed, and leaves a report.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loader.fakes import DIGITS, Images
from stream.fakes import producers_of
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler
from torch.utils.data.distributed import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

import streamaug as sa
from streamaug.config import LoaderConfig, Recipe, StreamConfig
from streamaug.integrations import gather_state
from streamaug.orders import Planner, Schedule

COUNT, BATCH, EPOCHS = 43, 8, 3
Delivered = list[list[list[int]]]  # batch -> [ids of synthetic images (-1: real), indices of real ones (-1: synthetic)]


def make_stream(rank: int = 0, world_size: int = 1, backend: str = "local") -> sa.Stream:
    schedule = Schedule(np.linspace(0, 1, 11), np.linspace(1, 0, 11))
    return sa.Stream(
        Planner(np.arange(30) % 10, 10, schedule, [Recipe(kind="noise")], batch_size=6, seed=1),
        engine="loader.engine:build",
        engine_options={},
        image_shape=(1, 8, 8),
        config=StreamConfig(batch_size=6, in_flight=3, backend=backend),
        class_names=DIGITS,
        loader_config=LoaderConfig(ratio=0.5),
        rank=rank,
        world_size=world_size,
    )


def written_down(images: torch.Tensor, ids: torch.Tensor) -> list[list[int]]:
    """Checks each synthetic image against its id on the way."""
    synthetic = ids >= 0
    expected = (ids[synthetic] % 200 + 50) / 255
    assert torch.allclose(images[synthetic][:, 0, 4, 4], expected.to(images.dtype))
    indices = torch.where(synthetic, -1, (images[:, 0, 0, 1] * 1000).round().long())
    return [ids.tolist(), indices.tolist()]


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(64, 10))

    def forward(self, images):
        return self.layers(images)


def torch_run(
    folder: Path,
    stream: sa.Stream,
    *,
    stop: int = 0,
    resume: bool = False,
    gather: bool = False,
    stateful: bool = False,
    **options: Any,
) -> Delivered:
    """torchrun and DistributedDataParallel, or a single process. `gather`: one state for any number of ranks."""
    torch.manual_seed(1)
    dataset = Images(COUNT)
    several = stream.world_size > 1
    if several or gather:
        sampler: Any = DistributedSampler(dataset, stream.world_size, stream.rank)
    else:
        sampler = RandomSampler(dataset)
    kind = StatefulDataLoader if stateful else DataLoader
    real = kind(dataset, batch_size=BATCH, sampler=sampler, num_workers=options.pop("num_workers", 0))
    loader = sa.StreamLoader(real, stream, ratio=0.5, with_ids=True, **options)
    model = nn.parallel.DistributedDataParallel(Classifier()) if several else Classifier()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    file, first_epoch, delivered = folder / f"torch_{0 if gather else stream.rank}.pt", 0, []
    if resume:
        torch.rand(5)
        loader.load_state_dict(torch.load(file))
        first_epoch = loader.state_dict()["epoch"]
    for epoch in range(first_epoch, EPOCHS):
        loader.set_epoch(epoch)
        for images, labels, ids in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            delivered.append(written_down(images, ids))
            if len(delivered) == stop:
                state = gather_state(loader.state_dict()) if gather else loader.state_dict()
                if stream.rank == 0 or not gather:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    torch.save(state, file)
                return delivered
    return delivered


def accelerate_run(
    folder: Path,
    stream: sa.Stream,
    *,
    stop: int = 0,
    resume: bool = False,
    skip: bool = False,
    gathered: list[int] | None = None,
    synced: list[bool] | None = None,
    mode: str = "replace",
    displaced: str = "drop",
    **options: Any,
) -> Delivered:
    import accelerate

    torch.manual_seed(1)
    accelerator = accelerate.Accelerator(
        cpu=True,
        gradient_accumulation_steps=2,
        dataloader_config=accelerate.DataLoaderConfiguration(**options),
    )
    real = DataLoader(Images(COUNT), batch_size=BATCH, shuffle=True)
    loader = sa.StreamLoader(real, stream, ratio=0.5, mode=mode, displaced=displaced, with_ids=True)
    model = Classifier()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    assert isinstance(loader, sa.StreamLoader)
    first_epoch, delivered, even = 0, [], options.get("even_batches", True)
    if resume:
        torch.rand(5)
        accelerator.load_state(folder / "accelerate")
        first_epoch = loader.state_dict()["epoch"]
    for epoch in range(first_epoch, EPOCHS):
        loader.set_epoch(epoch)
        batches: Any = loader
        length = len(loader)
        whole_epoch = not loader.state_dict()["batch"]
        images_gathered = images_delivered = 0
        ends: list[bool] = []
        if skip and epoch == first_epoch:
            batches = accelerate.skip_first_batches(loader, loader.state_dict()["batch"])
        for images, labels, ids in batches:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(images), labels))
                optimizer.step()
                optimizer.zero_grad()
            delivered.append(written_down(images, ids))
            if even:  # else gathering needs padding, as without us
                images_gathered += len(accelerator.gather_for_metrics(labels))
            images_delivered += len(labels) * stream.world_size
            if gathered is not None:
                gathered.append(images_gathered)
            if synced is not None:
                synced.append(accelerator.sync_gradients)
            ends.append(accelerator.gradient_state.end_of_dataloader)
            if len(delivered) == stop:
                accelerator.save_state(folder / "accelerate")
                return delivered
        if ends:  # nothing is left of an epoch at whose end the run was stopped
            assert ends == [False] * (len(ends) - 1) + [True] and accelerator.sync_gradients
        if whole_epoch:
            assert len(ends) == length
            gathers_all = (mode, displaced) != ("replace", "drop")
            assert not even or images_gathered == (images_delivered if gathers_all else COUNT)
    return delivered


def lightning_run(
    folder: Path,
    stream: sa.Stream,
    *,
    stop: int = 0,
    resume: bool = False,
    every: int | None = None,
    callback: Any = None,
    any_ranks: bool = False,
    combined: bool = False,
    shuffle: bool = True,
    mode: str = "replace",
    displaced: str = "drop",
    scheduled: bool = False,
    **options: Any,
) -> Delivered:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.utilities import CombinedLoader

    delivered: Delivered = []
    loaders: list[sa.StreamLoader] = []

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.classifier = Classifier()

        def training_step(self, batch, batch_idx):
            images, labels, ids = batch["mixed"] if combined else batch
            assert loaders[-1].state_dict()["batch"] == batch_idx + 1, "Lightning and the loader count alike"
            delivered.append(written_down(images, ids))
            losses = nn.functional.cross_entropy(self.classifier(images), labels, reduction="none")
            return {"loss": losses.mean(), "losses": losses} if not combined else losses.mean()

        def validation_step(self, batch, batch_idx):
            self.classifier(batch[0])

        def configure_optimizers(self):
            if scheduled:  # the length of a learning-rate schedule, for which Lightning makes the loader early
                assert self.trainer.estimated_stepping_batches == EPOCHS * -(-COUNT // BATCH)
            return torch.optim.SGD(self.parameters(), 0.1)

    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            real = DataLoader(Images(COUNT), batch_size=BATCH, shuffle=shuffle)
            loader = sa.StreamLoader(real, stream, ratio=0.5, mode=mode, displaced=displaced, with_ids=True)
            loaders.append(loader)
            other = DataLoader(Images(10), batch_size=4, generator=torch.Generator())
            return CombinedLoader({"mixed": loader, "other": other}, "max_size_cycle") if combined else loader

        def val_dataloader(self):
            return DataLoader(Images(10), batch_size=5, generator=torch.Generator())  # leaves the global one alone

    torch.manual_seed(1)
    several = stream.world_size > 1
    saving = ModelCheckpoint(
        dirpath=folder / "lightning", filename="{step}", save_top_k=-1, every_n_train_steps=every or stop or 1000
    )
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        max_steps=stop or -1,
        accelerator="cpu",
        devices=stream.world_size,
        strategy="ddp" if several else "auto",
        callbacks=[callback or sa_callback(any_ranks=any_ranks), saving],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )
    checkpoint = None
    if resume:
        torch.rand(5)
        checkpoint = next((folder / "lightning").glob("*.ckpt")) if resume is True else folder / "lightning" / resume
    trainer.fit(Module(), datamodule=Data(), ckpt_path=checkpoint)
    return delivered


def sa_callback(**options: Any) -> Any:
    from streamaug.integrations import StreamCallback

    return StreamCallback(**options)


class Dictionaries(Images):
    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return {"pixel_values": image, "labels": label}


class WithoutLength(IterableDataset):
    """Those images in their order."""

    def __iter__(self):
        return iter(Dictionaries(COUNT)[index] for index in range(COUNT))


class Classifies(nn.Module):
    """As the Trainer calls models; writes down what it is given."""

    def __init__(self):
        super().__init__()
        self.classifier = Classifier()
        self.delivered: Delivered = []

    def forward(self, pixel_values, labels, synthetic_ids):
        self.delivered.append(written_down(pixel_values, synthetic_ids))
        return {"loss": nn.functional.cross_entropy(self.classifier(pixel_values), labels)}


def trainer_run(
    folder: Path,
    stream: sa.Stream,
    *,
    stop: int = 0,
    resume: bool = False,
    mixin: bool = False,
    iterable: bool = False,
    every: int | None = None,
    batch_size: int = BATCH,
    mode: str = "replace",
    displaced: str = "drop",
    **options: Any,
) -> Delivered:
    from transformers import Trainer, TrainingArguments

    from streamaug.integrations import StreamTrainerMixin, add_stream

    class Mixed(StreamTrainerMixin, Trainer):
        pass

    arguments = TrainingArguments(
        str(folder / "trainer"),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=batch_size,
        save_strategy="steps" if every or stop else "no",
        save_steps=every or stop or 500,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        remove_unused_columns=False,
        seed=1,
        **options,
    )
    model, dataset = Classifies(), WithoutLength() if iterable else Dictionaries(COUNT)
    mixed = {"ratio": 0.5, "mode": mode, "displaced": displaced, "with_ids": True}
    if mixin:
        trainer = Mixed(model, arguments, train_dataset=dataset, stream=stream, stream_options=mixed)
    else:
        trainer = add_stream(Trainer(model, arguments, train_dataset=dataset), stream, **mixed)
    if stop:
        trainer.add_callback(stop_at(stop))
    if resume:
        torch.rand(5)
        resume = str(folder / "trainer" / resume) if isinstance(resume, str) else True
    trainer.train(resume_from_checkpoint=resume or None)
    if not stop and "max_steps" not in options:
        assert trainer.state.epoch == EPOCHS and trainer.state.global_step == trainer.state.max_steps
    return model.delivered


def stop_at(step: int) -> Any:
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= step

    return Stop()


RUNS: dict[str, Callable[..., Delivered]] = {
    "torch": torch_run,
    "accelerate": accelerate_run,
    "lightning": lightning_run,
    "trainer": trainer_run,
}


def interrupted(name: str, folder: Path, rank: int = 0, world_size: int = 1, stop: int = 4, **options: Any) -> dict:
    """A framework's run whole, and stopped and resumed; the stopped one reads a producer process."""
    with make_stream(rank, world_size) as stream:
        whole = RUNS[name](folder / "whole", stream, **options)
    pids: list[int] = []
    with make_stream(rank, world_size, "process") as stream:
        take = stream.take

        def noting(n):
            batch = take(n)
            pids[:] = producers_of(stream)
            return batch

        stream.take = noting
        first = RUNS[name](folder, stream, stop=stop, **options)
    if world_size > 1:
        torch.distributed.barrier()  # as if all had ended: what one of them resumes from is complete
    with make_stream(rank, world_size) as stream:
        rest = RUNS[name](folder, stream, resume=True, **options)
    return {"whole": whole, "parts": first + rest, "first": len(first), "pids": pids}


def only(name: str, folder: Path, rank: int, world_size: int, **options: Any) -> Delivered:
    """One part of a run: its beginning (`stop`) or its rest (`resume`), for a change of the number of ranks between."""
    with make_stream(rank, world_size) as stream:
        return RUNS[name](folder, stream, **options)


def main() -> None:
    """Arguments: the folder, and cases in JSON: a framework, options, and for `only` the name of a folder.

    [["accelerate", {"stop": 2}, null], ["trainer", {}, null], ["accelerate", {"resume": true}, "one"]]
    """
    folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo")
    report: dict[str, Any] = {}
    for name, options, part in cases:
        if part is None:
            report[name] = interrupted(name, folder, rank, world_size, **options)
        else:
            report[part] = only(name, folder / part, rank, world_size, **options)
    (folder / f"rank{rank}.json").write_text(json.dumps(report))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

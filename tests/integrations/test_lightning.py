"""What Lightning's options and our callback do beyond handing out batches."""

import lightning.pytorch as pl
import pytest
import torch
from loader.fakes import DIGITS, FakeStream, Images, real_loader
from stream.fakes import producers_of, running, until
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from streamaug.errors import StateError, UsageError
from streamaug.integrations import StreamCallback
from streamaug.loader import StreamLoader

from .runs import BATCH, COUNT, EPOCHS, lightning_run, make_stream

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(300)]
BATCHES = -(-COUNT // BATCH)


def run(tmp_path, **options):
    with make_stream() as stream:
        return lightning_run(tmp_path, stream, **options)


def test_limits_validation_in_mid_epoch_and_combined_loaders_leave_the_order_alone(tmp_path):
    whole = run(tmp_path)
    for options in ({"val_check_interval": 2}, {"combined": True}):
        assert run(tmp_path, **options) == whole, options
    limited = run(tmp_path, limit_train_batches=4)
    assert len(limited) == EPOCHS * 4 and limited[:4] == whole[:4]


def test_overfit_batches_repeats_the_same_real_images(tmp_path):
    delivered = run(tmp_path, overfit_batches=2)
    assert len(delivered) == EPOCHS * 2
    for first, later in zip(delivered[:2], delivered[2:4], strict=True):
        base = 0 if first is delivered[0] else BATCH
        for indices in (first[1], later[1]):
            assert {index for index in indices if index >= 0} <= set(range(base, base + BATCH))


@pytest.mark.parametrize("scheduled", [False, True])
def test_a_checkpoint_of_any_step_is_resumed_with_the_next_batch(tmp_path, scheduled):
    whole = run(tmp_path, every=1)
    for step in (2, BATCHES, BATCHES + 1):
        assert run(tmp_path, resume=f"step={step}.ckpt", scheduled=scheduled) == whole[step:], step


class Module(pl.LightningModule):
    def __init__(self, fail_at=-1):
        super().__init__()
        self.layer = torch.nn.Linear(64, 10)
        self.fail_at = fail_at

    def training_step(self, batch, batch_idx):
        if batch_idx == self.fail_at:
            raise RuntimeError("out of memory")
        losses = torch.nn.functional.cross_entropy(self.layer(batch[0].flatten(1)), batch[1], reduction="none")
        return {"loss": losses.mean(), "losses": losses}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(module, loader, tmp_path, callback=None, **options):
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[callback or StreamCallback()],
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        **options,
    )
    trainer.fit(module, loader)
    return trainer


def test_the_callback_feeds_losses_back_logs_figures_and_ends_the_producer(tmp_path):
    stream = make_stream(backend="process")
    heard = []
    stream.feedback = lambda labels, losses, ids: heard.append((labels.tolist(), losses.tolist(), ids.tolist()))
    loader = StreamLoader(real_loader(), stream, ratio=0.5, with_ids=True)
    pids = []
    take = stream.take
    stream.take = lambda n: (take(n), pids.extend(producers_of(stream)))[0]
    trainer = fit(Module(), loader, tmp_path, log_every_n_steps=1)
    assert len(heard) == 5 and all(len(labels) == len(losses) == len(ids) == 8 for labels, losses, ids in heard)
    assert trainer.callback_metrics["stream/share"] == 0.5 and trainer.callback_metrics["stream/acceptance"] == 1
    assert pids
    until(lambda: not running(pids[-1]))


def test_the_producer_ends_with_a_fit_that_fails(tmp_path):
    stream = make_stream(backend="process")
    pids = []
    take = stream.take
    stream.take = lambda n: (take(n), pids.extend(producers_of(stream)))[0]
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(Module(fail_at=2), StreamLoader(real_loader(), stream, ratio=0.5), tmp_path)
    until(lambda: not running(pids[-1]))


def test_losses_that_are_not_one_per_image_are_refused(tmp_path):
    class Wrong(Module):
        def training_step(self, batch, batch_idx):
            out = super().training_step(batch, batch_idx)
            return out | {"losses": out["losses"][:3]}

    with make_stream() as stream, pytest.raises(UsageError, match="3 values for a batch of 8 images"):
        fit(Wrong(), StreamLoader(real_loader(), stream, ratio=0.5), tmp_path)


def test_without_the_callback_a_single_process_trains_as_well(tmp_path):
    loader = StreamLoader(real_loader(), FakeStream(), ratio=0.5)
    fit(Module(), loader, tmp_path, callback=pl.Callback())
    assert loader.stats().synthetic == 20


def test_feedback_names_classes_as_the_stream_numbers_them():
    class Named(Images):
        classes = DIGITS[::-1]

    loader = StreamLoader(DataLoader(Named(), batch_size=8), FakeStream(), ratio=0.5, with_ids=True)
    batch = next(iter(loader))
    labels, ids = loader.labels_and_ids(batch)
    assert batch[1][ids >= 0].tolist() == [9 - i % 10 for i in ids[ids >= 0].tolist()]
    assert labels[ids >= 0].tolist() == [i % 10 for i in ids[ids >= 0].tolist()]


def test_one_process_may_shuffle_as_several_do_and_its_checkpoints_keep_to_that(tmp_path):
    whole = run(tmp_path, any_ranks=True, every=1)
    first = DistributedSampler(Images(COUNT), 1, 0)
    assert [index for batch in whole[:1] for index in batch[1] if index >= 0] == [
        index for index, number in zip(first, whole[0][0], strict=False) if number < 0
    ]
    assert run(tmp_path, resume="step=3.ckpt") == whole[3:]
    assert run(tmp_path / "none", any_ranks=False)[:BATCHES] != whole[:BATCHES]


def test_a_checkpoint_of_another_number_of_ranks_needs_an_order_that_all_of_them_draw(tmp_path):
    run(tmp_path, stop=2)
    file = next((tmp_path / "lightning").glob("*.ckpt"))
    checkpoint = torch.load(file)
    loop = checkpoint["loops"]["fit_loop"]["state_dict"]
    (alone,) = loop["combined_loader"]
    two = [{**alone, "stream": {**alone["stream"], "rank": rank, "world_size": 2}} for rank in range(2)]
    loop["combined_loader"] = [{"ranks": two}]
    torch.save(checkpoint, file)
    with pytest.raises(StateError, match=r"saved by 2 ranks .* is loaded by 1: .*StreamCallback\(any_ranks=True\)"):
        run(tmp_path, resume=True)

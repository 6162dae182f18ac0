"""What Accelerate reads and does beyond handing out batches."""

import accelerate
import pytest
import torch
from loader.fakes import FakeStream, Images, real_indices, real_loader
from torch import nn
from torch.utils.data import DataLoader

from streamaug.errors import StateError, UsageError
from streamaug.loader import StreamLoader

from .runs import BATCH, COUNT, accelerate_run, make_stream

BATCHES = -(-COUNT // BATCH)


def prepared(loader, **options):
    return accelerate.Accelerator(cpu=True, **options).prepare(loader)


def test_prepare_shards_and_places_the_real_loader_and_leaves_the_stream_loader_in_place():
    accelerator = accelerate.Accelerator(cpu=True)
    loader = StreamLoader(real_loader(), FakeStream(), ratio=0.5)
    out, optimizer = accelerator.prepare(loader, torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1))
    assert out is loader and isinstance(optimizer, accelerate.optimizer.AcceleratedOptimizer)
    assert isinstance(loader.real_loader, accelerate.data_loader.DataLoaderShard)
    assert loader.real_loader.device == accelerator.device and len(loader) == 5
    again = loader.real_loader
    assert accelerator.prepare(loader).real_loader is again
    bare = accelerator.prepare(real_loader())
    assert isinstance(bare, accelerate.data_loader.DataLoaderShard)


def test_gradients_are_synchronised_at_the_end_of_the_epoch_and_gathering_sees_every_image_once(tmp_path):
    synced, gathered = [], []
    with make_stream() as stream:
        delivered = accelerate_run(tmp_path, stream, synced=synced, gathered=gathered, use_seedable_sampler=True)
    assert gathered[:BATCHES] == [8, 16, 24, 32, 40, COUNT] and len(delivered[BATCHES - 1][0]) == COUNT % BATCH
    assert synced[:BATCHES] == [False, True] * 3 and len(set(map(tuple, (synced[:6], synced[6:12])))) == 1


def test_the_last_batch_ends_an_accumulation_that_is_not_full():
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    loader = accelerator.prepare(StreamLoader(real_loader(), FakeStream(), ratio=0.5))
    model = nn.Linear(1, 1)
    synced = []
    for _ in loader:
        with accelerator.accumulate(model):
            synced.append(accelerator.sync_gradients)
    assert synced == [False, True, False, True, True]


def test_gathering_keeps_what_append_added():
    accelerator = accelerate.Accelerator(cpu=True)
    loader = accelerator.prepare(StreamLoader(real_loader(count=42), FakeStream(), ratio=0.5, mode="append"))
    assert [len(accelerator.gather_for_metrics(labels)) for _, labels in loader] == [16] * 5 + [4]


def test_skipping_batches_keeps_the_stream_whatever_the_function_was_imported_as():
    from accelerate import skip_first_batches

    accelerator = accelerate.Accelerator(cpu=True)
    stream = FakeStream()
    loader = accelerator.prepare(StreamLoader(real_loader(), stream, ratio=0.5, with_ids=True))
    for skip in (skip_first_batches, accelerator.skip_first_batches):
        rest = skip(loader, 2)
        assert len(rest) == 3
        batches = list(rest)
        assert all(index >= 16 for batch in batches for index in real_indices(batch))
        assert sum(int((ids >= 0).sum()) for _, _, ids in batches) == 12
    assert stream.next_id == 24
    assert len(list(loader)) == 5
    assert len(list(skip_first_batches(real_loader(), 2))) == 3


def test_defer_is_refused_with_the_reason():
    with pytest.raises(UsageError, match="gradient accumulation"):
        prepared(StreamLoader(real_loader(), FakeStream(), ratio=0.5, displaced="defer"))


def test_a_checkpoint_without_the_loaders_state_is_refused(tmp_path):
    accelerate.Accelerator(cpu=True).save_state(tmp_path)
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.prepare(StreamLoader(DataLoader(Images(), batch_size=8), FakeStream(), ratio=0.5))
    with pytest.raises(StateError, match=r"stream_loader_0_rank0\.pt"):
        accelerator.load_state(tmp_path)

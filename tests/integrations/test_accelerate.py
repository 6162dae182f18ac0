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

pytestmark = pytest.mark.timeout(300)
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


@pytest.mark.parametrize(("count", "ratio", "lengths"), [(43, 0.5, [11, 11]), (40, 0.25, [7, 7]), (24, 0, [3, 3])])
def test_deferred_images_end_the_epoch_and_the_accumulation_when_the_last_of_them_was_delivered(count, ratio, lengths):
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    stream = FakeStream()
    loader = StreamLoader(real_loader(count=count), stream, ratio=ratio, displaced="defer", with_ids=True)
    loader = accelerator.prepare(loader)
    model = nn.Linear(1, 1)
    for length in lengths:
        assert len(loader) == length
        real, synced, ends, gathered, delivered = [], [], [], 0, 0
        for batch in loader:
            with accelerator.accumulate(model):
                synced.append(accelerator.sync_gradients)
                ends.append(accelerator.gradient_state.end_of_dataloader)
            real += real_indices(batch)
            gathered += len(accelerator.gather_for_metrics(batch[1]))
            delivered += len(batch[1])
        assert sorted(real) == list(range(count)) and ends == [False] * (length - 1) + [True]
        assert synced == [turn % 2 == 1 or turn == length - 1 for turn in range(length)]
        assert not accelerator.gradient_state.in_dataloader
        assert gathered == delivered
    assert loader.stats().real == len(lengths) * count and loader.stats().synthetic == stream.next_id


def test_a_live_ratio_moves_the_end_of_a_deferring_epoch():
    accelerator = accelerate.Accelerator(cpu=True)
    loader = accelerator.prepare(StreamLoader(real_loader(count=40), FakeStream(), ratio=0.5, displaced="defer"))
    ends = []
    for number, _ in enumerate(loader):
        ends.append(accelerator.gradient_state.end_of_dataloader)
        if number == 3:
            loader.ratio = 0
    assert ends == [False] * 6 + [True], "four batches of 4 real images, then three of 8"


def test_ranks_that_would_deliver_different_numbers_of_deferred_batches_are_refused(monkeypatch):
    accelerator = accelerate.Accelerator(
        cpu=True, dataloader_config=accelerate.DataLoaderConfiguration(even_batches=False)
    )
    monkeypatch.setattr(type(accelerator), "num_processes", 2)
    with pytest.raises(UsageError, match="leave dispatch_batches and even_batches of Accelerate as they are"):
        accelerator.prepare(StreamLoader(real_loader(), FakeStream(), ratio=0.5, displaced="defer"))


def test_a_loader_that_is_made_within_the_call_of_prepare_is_prepared_as_well():
    """In accelerator.prepare(StreamLoader(...)) `prepare` is looked up before there is a StreamLoader to change it."""
    accelerator = accelerate.Accelerator(cpu=True)
    loader = StreamLoader(real_loader(), FakeStream(), ratio=0.5)
    looked_up_before = type(accelerator).prepare.__wrapped__
    assert looked_up_before(accelerator, loader) is loader
    assert isinstance(loader.real_loader, accelerate.data_loader.DataLoaderShard)


def test_prepare_data_loader_alone_keeps_the_stream():
    accelerator = accelerate.Accelerator(cpu=True)
    loader = StreamLoader(real_loader(), FakeStream(), ratio=0.5)
    assert accelerator.prepare_data_loader(loader) is loader
    assert isinstance(loader.real_loader, accelerate.data_loader.DataLoaderShard)
    list(loader)
    assert loader.stats().synthetic == 20


def test_another_number_of_ranks_needs_an_order_that_all_of_them_draw(tmp_path):
    accelerator = accelerate.Accelerator(cpu=True)
    loader = accelerator.prepare(StreamLoader(real_loader(shuffle=True), FakeStream(), ratio=0.5))
    next(iter(loader))
    accelerator.save_state(tmp_path)
    loader.stream.world_size = 2
    with pytest.raises(StateError, match=r"saved by 1 ranks .* is loaded by 2: .*use_seedable_sampler=True"):
        accelerator.load_state(tmp_path)


def test_a_checkpoint_without_the_loaders_state_is_refused(tmp_path):
    accelerate.Accelerator(cpu=True).save_state(tmp_path)
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.prepare(StreamLoader(DataLoader(Images(), batch_size=8), FakeStream(), ratio=0.5))
    with pytest.raises(StateError, match=r"stream_loader_0_rank0\.pt"):
        accelerator.load_state(tmp_path)

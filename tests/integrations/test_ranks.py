"""A run that is resumed with another number of ranks."""

import pytest
from loader.fakes import FakeStream, Images, real_indices
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from streamaug.errors import StateError
from streamaug.loader import StreamLoader
from streamaug.stream.redeal import redeal

from .runs import make_stream

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")

EPOCH = 48


def ranks_of(count):
    """A loader for each rank, as torchrun's processes build them."""
    loaders = []
    for rank in range(count):
        sampler = DistributedSampler(Images(EPOCH), num_replicas=count, rank=rank, seed=3)
        real = DataLoader(Images(EPOCH), batch_size=4, sampler=sampler)
        loaders.append(StreamLoader(real, make_stream(rank, count), ratio=0.5, mode="append", with_ids=True))
    return loaders


def delivered(loaders, batches=None):
    """Of all ranks: ids of synthetic images, and indices of real ones."""
    ids, real = [], []
    for loader in loaders:
        for number, batch in enumerate(loader, 1):
            ids += [i for i in batch[2].tolist() if i >= 0]
            real += real_indices(batch)
            if number == batches:
                break
    return ids, real


def closed(loaders):
    states = [loader.state_dict() for loader in loaders]
    for loader in loaders:
        loader.stream.close()
    return {"ranks": states}


@pytest.mark.parametrize(("before", "after", "batches"), [(1, 2, 4), (2, 1, 3), (2, 3, 3), (3, 2, 2)])
def test_what_was_not_delivered_is_dealt_out_to_the_new_ranks_and_nothing_comes_twice(before, after, batches):
    first = ranks_of(before)
    ids, real = delivered(first, batches)
    state = closed(first)
    second = ranks_of(after)
    for loader in second:
        loader.load_state_dict(state)
    more_ids, more_real = delivered(second)
    closed(second)
    assert sorted(real + more_real) == list(range(EPOCH))
    assert len(ids + more_ids) == len(set(ids + more_ids)) == EPOCH
    assert set(range(EPOCH // 2)) <= set(ids + more_ids), "no order is left out"


def test_orders_that_a_slower_rank_had_not_planned_yet_are_dealt_out_as_well():
    states = []
    for rank, images in ((0, 40), (1, 7)):
        with make_stream(rank, 2) as stream:
            stream.take(images)
            states.append(stream.state_dict())
    dealt = redeal(states, 3)
    planned = [k for state in dealt for k, _, _ in state["undelivered"]]
    begun = {state["undelivered"][0][0] for state in states}
    assert len(planned) == len(set(planned)) and begun <= set(planned)
    end = max(state["next_k"] for state in states)
    ended = {0, 2, 4, 6, 8, 10} | {1}  # 40 images are 6 batches of rank 0 and a part, 7 one of rank 1 and a part
    assert set(planned) == set(range(end)) - ended
    assert sorted(state["next_k"] for state in dealt) == [end, end + 1, end + 2]
    for rank, state in enumerate(dealt):
        assert state["next_k"] % 3 == rank
        with make_stream(rank, 3) as stream:
            stream.load_state_dict(state)
            stream.take(20)


def test_a_real_loader_with_a_state_of_its_own_is_not_shared_out_anew():
    from torchdata.stateful_dataloader import StatefulDataLoader

    loader = StreamLoader(StatefulDataLoader(Images(8), batch_size=4), make_stream(), ratio=0.5)
    next(iter(loader))
    state = closed([loader])
    other = ranks_of(2)
    with pytest.raises(StateError, match="saved by 1 ranks and is loaded by 2"):
        other[0].load_state_dict(state)
    closed(other)


@pytest.mark.parametrize("options", [{}, {"mode": "append"}])
def test_every_rank_delivers_as_many_batches_whatever_starves(options):
    """Rank 0 has every image it asks for, rank 1 three a batch at first and then none."""
    batches = []
    for rank in (0, 1):
        sampler = DistributedSampler(Images(EPOCH), num_replicas=2, rank=rank, seed=3)
        stream = FakeStream(starved="real", rank=rank)
        loader = StreamLoader(DataLoader(Images(EPOCH), batch_size=4, sampler=sampler), stream, ratio=0.5, **options)
        delivered = []
        for epoch in range(2):
            stream.available = None if rank == 0 else 3 * (1 - epoch)
            delivered.append(len([*loader]))
        batches.append(delivered)
        assert loader.stats().shortfall == 0 if rank == 0 else loader.stats().shortfall > 0
    assert batches == [[6, 6], [6, 6]]

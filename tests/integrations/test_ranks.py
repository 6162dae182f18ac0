"""A run that is resumed with another number of ranks."""

import pytest
from loader.fakes import FakeStream, Images, real_indices
from torch.utils.data import DataLoader, RandomSampler
from torch.utils.data.distributed import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from streamaug.errors import StateError
from streamaug.integrations import files
from streamaug.loader import StreamLoader
from streamaug.stream.redeal import redeal

from .runs import make_stream

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")

EPOCH = 48


def ranks_of(count, kind=DataLoader, batch_size=4, sampler=DistributedSampler, **options):
    """A loader for each rank, as torchrun's processes build them."""
    loaders = []
    for rank in range(count):
        dealt = sampler(Images(EPOCH), num_replicas=count, rank=rank, seed=3)
        real = kind(Images(EPOCH), batch_size=batch_size, sampler=dealt)
        options = {"ratio": 0.5, "mode": "append", "with_ids": True} | options
        loaders.append(StreamLoader(real, make_stream(rank, count), **options))
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


CHANGES = [(1, 2, 4), (2, 1, 3), (2, 3, 3), (3, 2, 2)]  # ranks before, ranks after, batches before


def of_one_epoch(before, after, batches, now=None, **options):
    """Of an epoch that one number of ranks began and another ended: ids, indices, and batches of the new ranks."""
    first = ranks_of(before, **options)
    ids, real = delivered(first, batches)
    state = closed(first)
    second = ranks_of(after, **(options | (now or {})))
    left = []
    for loader in second:
        loader.load_state_dict(state)
        more_ids, more_real = delivered([loader])
        ids, real = ids + more_ids, real + more_real
        left.append(loader.stats().batches - batches * before // after)
    closed(second)
    return ids, real, left


@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
@pytest.mark.parametrize(("before", "after", "batches"), CHANGES)
def test_what_was_not_delivered_is_dealt_out_to_the_new_ranks_and_nothing_comes_twice(before, after, batches, kind):
    ids, real, left = of_one_epoch(before, after, batches, kind=kind)
    assert sorted(real) == list(range(EPOCH))
    assert len(ids) == len(set(ids)) == EPOCH
    assert set(range(EPOCH // 2)) <= set(ids), "no order is left out"
    assert len(set(left)) == 1, "every rank delivers as many batches"


@pytest.mark.parametrize(("before", "after", "batches"), [*CHANGES, (1, 2, 1), (2, 1, 11), (1, 3, 2)])
def test_real_images_that_were_held_back_are_dealt_out_as_well(before, after, batches, caplog):
    ids, real, left = of_one_epoch(before, after, batches, mode="replace", displaced="defer")
    assert len(real) == len(set(real)) and len(ids) == len(set(ids))
    passed = sum(record.args[0] for record in caplog.records if "passed over" in record.msg)
    assert len(real) == EPOCH - passed and passed < 2 * after * 4
    assert len(set(left)) == 1


@pytest.mark.parametrize(("before", "after", "batches", "now"), [(1, 2, 3, 2), (2, 1, 5, 8), (2, 3, 3, 2)])
def test_the_position_is_counted_in_images_so_that_the_batch_size_may_change_with_the_ranks(
    before, after, batches, now
):
    _, real, _ = of_one_epoch(before, after, batches, {"batch_size": now})
    assert sorted(real) == list(range(EPOCH))


def test_a_state_that_was_dealt_out_and_saved_again_before_a_batch_counts_in_the_new_batch_size():
    first = ranks_of(2, batch_size=3)
    _, real = delivered(first, 4)
    second = ranks_of(1, batch_size=8)
    second[0].load_state_dict(closed(first))
    third = ranks_of(3, batch_size=2)
    state = closed(second)
    for loader in third:
        loader.load_state_dict(state)
    real += delivered(third)[1]
    closed(third)
    assert sorted(real) == list(range(EPOCH))


def test_a_number_of_images_that_the_new_ranks_cannot_share_is_passed_over_and_said(caplog):
    ids, real, _ = of_one_epoch(1, 2, 3)
    assert len(real) == len(set(real)) == EPOCH - 4 and len(ids) == len(set(ids))
    assert "4 real images are passed over in this epoch" in caplog.text


@pytest.mark.parametrize(("before", "after", "batch_size"), [(5, 1, 4), (1, 5, 7), (3, 2, 7)])
def test_with_the_last_batch_of_an_epoch_every_number_of_ranks_is_at_its_end(before, after, batch_size):
    first = ranks_of(before, batch_size=batch_size, ratio=0)
    for loader in first:
        batches = iter(loader)
        for _ in range(len(loader)):
            next(batches)
    states = closed(first)
    second = ranks_of(after, batch_size=batch_size, ratio=0)
    for loader in second:
        loader.load_state_dict(states)
        assert loader.state_dict()["batch"] == len(loader) and loader.epoch_is_over
        assert list(loader) == []
    closed(second)


def test_a_state_that_one_rank_saved_by_itself_is_dealt_out_to_two():
    first = ranks_of(1)
    ids, real = delivered(first, 4)
    state = closed(first)["ranks"][0]
    second = ranks_of(2)
    for loader in second:
        loader.load_state_dict(state)
    more_ids, more_real = delivered(second)
    closed(second)
    assert sorted(real + more_real) == list(range(EPOCH)) and not set(ids) & set(more_ids)


def test_a_state_that_was_dealt_out_is_saved_and_resumed_like_any_other():
    first = ranks_of(1, kind=StatefulDataLoader)
    _, real = delivered(first, 4)
    state = closed(first)
    for ranks, batches in ((2, 1), (2, 1), (1, 2)):
        now = ranks_of(ranks, kind=StatefulDataLoader)
        for loader in now:
            loader.load_state_dict(state)
        real += delivered(now, batches)[1]
        state = closed(now)
    now = ranks_of(2, kind=StatefulDataLoader)
    for loader in now:
        loader.load_state_dict(state)
    real += delivered(now)[1]
    closed(now)
    assert sorted(real) == list(range(EPOCH))


def shuffled_by_itself(dataset, **_):
    return RandomSampler(dataset)


def test_an_order_of_one_rank_alone_is_left_at_the_end_of_an_epoch_only():
    first = ranks_of(1, sampler=shuffled_by_itself)
    delivered(first, 4)
    inside = first[0].state_dict()
    delivered([first[0]], EPOCH // 4)
    at_end = closed(first)
    second = ranks_of(2)
    with pytest.raises(StateError, match=r"another for each number and is .* seed 3; give .* or start 1 ranks"):
        second[0].load_state_dict({"ranks": [inside]})
    for loader in second:
        loader.load_state_dict(at_end)
    assert delivered(second) == ([], []), "nothing is left of the epoch"
    ids, real = delivered(second)
    closed(second)
    assert sorted(real) == list(range(EPOCH)) and len(ids) == EPOCH


def test_synthetic_epochs_keep_their_steps_for_any_number_of_ranks():
    def endless(rank, ranks):
        return StreamLoader(None, make_stream(rank, ranks), epoch_steps=5, batch_size=4, with_ids=True)

    first = [endless(0, 1)]
    ids, _ = delivered(first, 2)
    state = closed(first)
    second = [endless(rank, 2) for rank in (0, 1)]
    for loader in second:
        loader.load_state_dict(state)
    rest = [delivered([loader])[0] for loader in second]
    closed(second)
    assert [len(one) for one in rest] == [12, 12]
    assert len({*ids, *rest[0], *rest[1]}) == len(ids) + 24


@pytest.mark.parametrize("order", [(1, 0), (0, 0, 1, 1), (0, 0)])
def test_states_that_are_not_those_of_all_ranks_in_their_order_are_not_shared_out(order):
    first = ranks_of(2)
    delivered(first, 2)
    states = closed(first)["ranks"]
    second = ranks_of(1)
    with pytest.raises(StateError, match=r"one state of each rank.* needed, in their order; got those of ranks "):
        second[0].load_state_dict({"ranks": [states[rank] for rank in order]})
    closed(second)


def test_another_seed_of_the_sampler_is_refused():
    first = ranks_of(2)
    delivered(first, 2)
    state = closed(first)
    real = DataLoader(Images(EPOCH), batch_size=4, sampler=DistributedSampler(Images(EPOCH), 1, 0, seed=4))
    loader = StreamLoader(real, make_stream(), ratio=0.5, mode="append")
    with pytest.raises(StateError, match="with seed 3 and is DistributedSampler with seed 4"):
        loader.load_state_dict(state)
    closed([loader])


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


def test_files_that_more_ranks_left_in_a_checkpoint_are_not_read(tmp_path):
    for count, batches in ((2, 1), (1, 4)):
        loaders = ranks_of(count)
        delivered(loaders, batches)
        for loader in loaders:
            files.save_state(loader, tmp_path, "loader")
        closed(loaders)
    second = ranks_of(2)
    for loader in second:
        assert files.load_state(loader, tmp_path, "loader")["ranks"] == 1
        assert loader.state_dict()["batch"] == 2
    closed(second)


def test_machines_that_keep_their_own_files_resume_as_many_ranks(tmp_path):
    loaders = ranks_of(2)
    delivered(loaders, 1)
    files.save_state(loaders[1], tmp_path, "loader", step=3)
    closed(loaders)
    loaders = ranks_of(2)
    assert files.load_state(loaders[1], tmp_path, "loader")["step"] == 3
    assert loaders[1].state_dict()["batch"] == 1
    closed(loaders)


def test_as_many_ranks_with_another_order_are_told_what_that_does_to_the_epoch(caplog):
    first = ranks_of(1)
    delivered(first, 2)
    state = closed(first)
    for sampler, warned in ((DistributedSampler, False), (shuffled_by_itself, True)):
        caplog.clear()
        again = ranks_of(1, sampler=sampler)
        again[0].load_state_dict(state)
        closed(again)
        assert ("was DistributedSampler with seed 3 when" in caplog.text) == warned


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

import contextlib
import copy
import gc
import json
import os
import subprocess
import sys
import threading
import time

import pytest
import segments
import torch
from stream import fakes as streams
from torch.utils.data import default_collate
from torch.utils.data.distributed import DistributedSampler
from torchdata.nodes import (
    Batcher,
    IterableWrapper,
    Loader,
    Mapper,
    MapStyleWrapper,
    ParallelMapper,
    PinMemory,
    Prefetcher,
)

from streamaug.errors import MismatchError, StateError, StreamaugError, UsageError
from streamaug.loader import Mix, StreamNode, exits
from streamaug.loader.interleave import Share, exact

from .conformance import assert_resumes_exactly, epochs_of, plain
from .fakes import FakeStream, Images, Steered

CLASSES = 10


def without_id(sample):
    return (*sample, -1)


def real_node(count=20, dataset=Images):
    images = dataset(count)
    samples = MapStyleWrapper(images, DistributedSampler(images, num_replicas=1, rank=0, seed=5))
    return Mapper(samples, without_id)


def synthetic_node(stream=None, **options):
    return StreamNode(stream or FakeStream(), with_ids=True, **options)


def mixed(ratio=0.3, stream=None, **options):
    return Mix(real_node(), synthetic_node(stream), ratio, **options)


def batched(samples):
    return Mapper(Batcher(samples, 4, drop_last=False), default_collate)


def shifted(sample):
    image, label, identity = sample
    return image + 1, label, identity


def exact_loader(graph):
    """torchdata's Loader that was restored at the end of an epoch reports that end from then on, unless told so."""
    return Loader(graph, restart_on_stop_iteration=False)


GRAPHS = {
    "samples": lambda: synthetic_node(epoch_steps=21),
    "batches": lambda: synthetic_node(batch_size=3, epoch_steps=7),
    "mix": mixed,
    "mix of batches": lambda: Mix(batched(real_node(40)), synthetic_node(batch_size=4), 0.3),
    "prefetched": lambda: Prefetcher(batched(mixed()), 3),
    "prefetched rarely saved": lambda: Prefetcher(batched(mixed()), 3, snapshot_frequency=2),
    "prefetched below": lambda: Mix(Prefetcher(real_node(), 3), Prefetcher(synthetic_node(), 5), 0.3),
    "mapped in threads": lambda: Batcher(ParallelMapper(mixed(), shifted, num_workers=2), 4),
    "an ending stream": lambda: Mix(real_node(), synthetic_node(epoch_steps=5), 0.3),
}


@pytest.mark.parametrize("graph", GRAPHS)
def test_every_graph_resumes_exactly(graph):
    assert_resumes_exactly(lambda: exact_loader(GRAPHS[graph]()))


def test_samples_come_in_order_with_their_labels_and_ids():
    stream = FakeStream()
    for identity, (image, label, given) in zip(range(40), synthetic_node(stream), strict=False):
        assert given == identity and label == identity % CLASSES
        assert image.shape == (1, 8, 8) and image[0, 4, 4] == torch.tensor((identity % 200 + 50) / 255)
    assert stream.next_id == 48, "the stream is read in its own batch size, 16"


def test_batches_come_in_the_size_asked_for():
    images, labels, ids = next(synthetic_node(batch_size=5))
    assert images.shape == (5, 1, 8, 8) and images.dtype == torch.float32
    assert labels.tolist() == ids.tolist() == list(range(5))


def test_an_epoch_has_its_steps_and_the_next_goes_on():
    epochs = epochs_of(Loader(synthetic_node(epoch_steps=7)), 3)
    assert [[item[2] for item in epoch] for epoch in epochs] == [list(range(7 * i, 7 * i + 7)) for i in range(3)]


def test_like_gives_the_real_dtype_and_range_and_refuses_another_size():
    assert next(synthetic_node(like=torch.zeros(1, 8, 8, dtype=torch.uint8)))[0].max() == 50
    assert next(synthetic_node(like=torch.linspace(-1, 1, 64).reshape(1, 8, 8)))[0].min() == -1
    with pytest.raises(MismatchError, match=r"differ in shape(.|\n)*\[3, 8, 8\](.|\n)*\[1, 8, 8\]"):
        synthetic_node(like=torch.rand(3, 8, 8))


def test_random_transforms_resume_and_leave_the_global_generator_alone():
    def noisy(image):
        return image.float() / 255 + torch.rand(image.shape)

    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert_resumes_exactly(lambda: exact_loader(synthetic_node(transform=noisy, epoch_steps=20)))
    assert torch.equal(torch.get_rng_state(), before)


def test_mixed_labels_need_soft_ones():
    with pytest.raises(MismatchError, match="mixed labels"):
        next(synthetic_node(FakeStream(mixed=True)))
    label = next(synthetic_node(FakeStream(mixed=True), soft_labels=True))[1]
    assert label[:2].tolist() == [0.75, 0.25]


def test_labels_follow_the_real_order_of_the_classes():
    names = [str(digit) for digit in reversed(range(CLASSES))]
    assert [next(synthetic_node(classes=names))[1]] == [9]


@pytest.mark.parametrize("ratio", [0.5, 0.3, 0.1, 0.75, 1 / 3])
def test_the_share_is_exact_in_every_stretch_and_no_real_item_is_lost(ratio):
    loader = Loader(mixed(ratio))
    delivered = [item for _ in range(4) for item in loader]
    made = [identity >= 0 for _, _, identity in delivered]
    share = Share()
    assert made == [bool(share.of_total(1, exact(ratio))) for _ in made]
    for first in range(0, len(made) - 8, 7):
        assert abs(sum(made[first : first + 8]) - 8 * ratio) <= 1
    real = [round(float(image[0, 0, 1]) * 1000) for image, _, identity in delivered if identity < 0]
    assert sorted(real) == sorted(list(range(20)) * 4)
    ids = [identity for _, _, identity in delivered if identity >= 0]
    assert ids == list(range(len(ids)))


def test_the_ratio_changes_while_it_runs_and_can_be_a_function_of_the_step():
    mix = Mix(
        IterableWrapper([(torch.zeros(1, 8, 8), 0, -1)] * 100), synthetic_node(), lambda step: step / 60, check=False
    )
    made = [identity >= 0 for _, _, identity in (next(mix) for _ in range(60))]
    assert sum(made[:30]) == 7 and sum(made) == 29
    mix.ratio = 0
    assert all(next(mix)[2] < 0 for _ in range(20))
    mix.ratio = 0.5
    assert sum(next(mix)[2] >= 0 for _ in range(20)) == 10


def test_at_ratio_zero_the_stream_is_not_touched():
    stream = FakeStream()
    loader = Loader(Mix(real_node(), Prefetcher(synthetic_node(stream), 2), 0))
    assert len(list(loader)) == 20
    assert loader.state_dict()["root"]["stream"] is None and stream.calls == 0


def test_the_state_is_plain_numbers():
    loader = Loader(mixed())
    next(iter(loader))
    assert json.loads(json.dumps(loader.state_dict())) == loader.state_dict()


@pytest.mark.parametrize(
    ("real", "words"),
    [
        ((torch.rand(3, 8, 8), 1, -1), r"float32 \[3, 8, 8\]"),
        ((torch.rand(1, 8, 8), torch.tensor(1), -1), r"1: int64 \[\]"),
        ((torch.rand(1, 8, 8), 1), "real:      0: float32"),
        ((torch.linspace(0, 255, 64).reshape(1, 8, 8), 1, -1), "values 0 to 255"),
        ((torch.linspace(-1, 1, 64).reshape(1, 8, 8), 1, -1), "values -1 to 1"),
        ({"image": torch.rand(1, 8, 8), "label": 1}, "'image': float32"),
    ],
)
def test_items_that_cannot_go_together_are_refused_with_both_sides(real, words):
    mix = Mix(IterableWrapper([real] * 100), synthetic_node(), 0.5)
    with pytest.raises(MismatchError, match=words) as refused:
        list(mix)
    assert "synthetic:" in str(refused.value) and "like=" in str(refused.value)
    assert len(list(Mix(IterableWrapper([real] * 100), synthetic_node(), 0.5, check=False))) == 201


def test_arguments_that_cannot_be_used_are_refused_at_once():
    with pytest.raises(UsageError, match="starved: real"):
        StreamNode(FakeStream(starved="real"))
    with pytest.raises(UsageError, match="epoch_steps is a whole number from 1, or None, got 0"):
        StreamNode(FakeStream(), epoch_steps=0)
    with pytest.raises(UsageError, match="is a Stream, got a list"):
        StreamNode([])
    with pytest.raises(UsageError, match=r"real_node is a .*BaseNode, got a list; IterableWrapper"):
        Mix([], synthetic_node())
    with pytest.raises(UsageError, match=r"in \[0, 1\), got 1.5"):
        Mix(real_node(), synthetic_node(), 1.5)


# Over a real producer process.


def graph_over(stream, prefetch=3, dataset=Images):
    """(image, label, id) batches of four, the real side as the stream's images: uint8-like noise in [0, 1]."""
    samples = Mix(real_node(dataset=dataset), StreamNode(stream, with_ids=True), 0.5)
    return Loader(Prefetcher(batched(samples), prefetch))


def threads_beyond(before):
    """Without the one in which multiprocessing serves tensors to other processes, which it never ends."""
    new = [thread for thread in threading.enumerate() if thread not in before and thread.is_alive()]
    return [thread for thread in new if "(_serve)" not in thread.name]


@pytest.fixture(autouse=True)
def nothing_stays_behind():
    before, memory = set(threading.enumerate()), segments.names()

    def all_ended():
        if threads_beyond(before):
            gc.collect()  # again and again: a thread that ends leaves the graph below it as garbage
        return not threads_beyond(before)

    yield
    with contextlib.suppress(AssertionError):
        streams.until(all_ended)
    assert threads_beyond(before) == []
    assert not segments.left_behind(memory)


def test_images_of_a_producer_process_arrive_each_once_and_resume_exactly():
    opened = []

    def make():
        opened.append(streams.make_stream(backend="process"))
        return graph_over(opened[-1])

    whole = epochs_of(make(), 2)
    ids = [identity for epoch in whole for _, _, batch in epoch for identity in batch if identity >= 0]
    assert len(ids) == 41 and sorted(ids) == sorted(set(ids))
    made = [
        torch.tensor(image).mul(255).round().byte().numpy().tobytes()
        for images, _, batch in whole[0]
        for image, identity in zip(images, batch, strict=True)
        if identity >= 0
    ]
    assert made == [pixels for *_, pixels in streams.undisturbed([21])]
    first = make()
    items = iter(first)
    delivered = [plain(next(items)) for _ in range(4)]
    state = first.state_dict()
    opened[-1].close()
    second = make()
    second.load_state_dict(state)
    delivered += [item for epoch in epochs_of(second, 2) for item in epoch]
    assert delivered == [item for epoch in whole for item in epoch]
    pids = [pid for stream in (opened[0], opened[-1]) for pid in streams.producers_of(stream)]
    for stream in opened:
        stream.close()
    streams.until(lambda: not any(streams.running(pid) for pid in pids))


def pinned():
    return exact_loader(PinMemory(Prefetcher(batched(mixed()), 3)))


def test_batches_that_are_pinned_resume_exactly(monkeypatch):
    """Without a GPU nothing can be pinned; a copy takes its place, all else is torchdata's own."""
    copied = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr("torchdata.nodes.pin_memory.pin_memory", lambda batch, device: (copied.append(1), batch)[1])
    assert_resumes_exactly(pinned)
    assert copied


@pytest.mark.gpu
def test_pinned_batches_resume_exactly():
    assert next(iter(pinned()))[0].is_pinned()
    assert_resumes_exactly(pinned)


@pytest.mark.matrix
def test_process_workers_behind_the_mix_leave_the_stream_alone():
    with streams.make_stream(backend="process") as stream:
        samples = Mix(real_node(), StreamNode(stream, with_ids=True), 0.5)
        graph = ParallelMapper(samples, shifted, num_workers=1, method="process", multiprocessing_context="spawn")
        ids = [identity for _, _, identity in Loader(graph)]
        assert sum(identity >= 0 for identity in ids) == 21
        assert len(stream.take(8)) == 8


class Failing(Images):
    def __getitem__(self, index):
        if index == 7:
            raise RuntimeError("unreadable image 7")
        return super().__getitem__(index)


def test_a_failing_real_node_ends_the_graph_with_its_error():
    with streams.make_stream(backend="process") as stream:
        with pytest.raises(RuntimeError, match="unreadable image 7"):
            list(graph_over(stream, dataset=Failing))
        pids = streams.producers_of(stream)
    streams.until(lambda: not any(streams.running(pid) for pid in pids))


def test_a_failing_producer_ends_the_graph_with_its_error():
    with streams.make_stream(backend="process", engine_options={"raise_at": 1}) as stream:
        loader = Loader(Mix(real_node(), Prefetcher(StreamNode(stream, with_ids=True), 2), 0.5))
        with pytest.raises(StreamaugError, match="the weights are rotten"):
            list(loader)


def test_closing_the_stream_ends_a_graph_that_waits_for_it():
    stream = streams.make_stream(backend="process", engine_options={"seconds": 30})
    loader = graph_over(stream)
    items, errors = iter(loader), []

    def read():
        try:
            next(items)
        except StreamaugError as error:
            errors.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    streams.until(lambda: stream.producer_pids)
    time.sleep(0.3)
    stream.close()
    reader.join(30)
    assert not reader.is_alive() and "closed" in str(errors[0])


def test_a_graphs_thread_that_waits_for_a_producer_does_not_hold_the_exit_up():
    """It rests but for moments. Other processes may hold it up in them, so one look of several has to show it."""

    def rests():
        seen = []
        for _ in range(20):
            time.sleep(0.02)
            seen += [exits._at_work(frame) for frame in exits._graph_threads()]
        return len(seen) >= 20 and sum(seen) < len(seen) / 4

    with streams.make_stream(backend="process", engine_options={"seconds": 600}) as stream:
        items = iter(graph_over(stream))
        streams.until(lambda: stream.producer_pids and stream._fleet.ready_ns)
        streams.until(rests)
    del items


HELD = """
import sys
from loader.test_nodes import graph_over
from stream.fakes import make_stream, producers_of
stream = make_stream(backend={backend!r}, engine_options={{"seconds": {seconds}}})
items = iter(graph_over(stream))
print(next(items)[2].tolist(), *([] if {backend!r} == "local" else producers_of(stream)), flush=True)
"""


@pytest.mark.timeout(200)
@pytest.mark.parametrize(("backend", "seconds"), [("process", 0.2), ("local", 0.01)])
def test_a_held_unstopped_graph_lets_the_interpreter_exit(backend, seconds):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    script = [sys.executable, "-c", HELD.format(backend=backend, seconds=seconds)]
    ended = subprocess.run(script, capture_output=True, text=True, env=environment, timeout=150)
    assert ended.returncode == 0 and not ended.stderr, ended.stderr
    assert any(int(identity) >= 0 for identity in ended.stdout[1:].partition("]")[0].split(","))
    pids = [int(pid) for pid in ended.stdout.partition("]")[2].split()]
    assert len(pids) == (backend == "process")
    streams.until(lambda: not any(streams.running(pid) for pid in pids))


def test_a_state_that_another_version_of_the_node_saved_is_refused():
    node = synthetic_node()
    with pytest.raises(StateError, match=r"a StreamNode's state has 'before', and this one has stream, offset: resume"):
        node.reset({"stream": {}, "offset": 3})


@pytest.mark.parametrize("batch_size", [None, 4])
def test_feedback_given_while_samples_of_one_reading_are_left_is_in_the_state(batch_size):
    def read(node, first, last):
        for step in range(first, last):
            if step in (3, 20):
                node.stream.feedback()
            yield plain(next(node))

    def build(state=None):
        node = StreamNode(Steered(), batch_size, with_ids=True)
        node.reset(state)
        return node

    whole = list(read(build(), 0, 40))
    assert len({str(item[2])[:2] for item in whole}) > 2
    for stop in (2, 3, 4, 15, 16, 17, 21, 32):
        node = build()
        assert list(read(node, 0, stop)) == whole[:stop]
        node = build(copy.deepcopy(node.get_state()))
        assert list(read(node, stop, stop + 2)) == whole[stop : stop + 2]
        node = build(copy.deepcopy(node.get_state()))
        assert list(read(node, stop + 2, 40)) == whole[stop + 2 :], stop

import multiprocessing
import re

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data.distributed import DistributedSampler

from streamaug.errors import StateError, UsageError
from streamaug.loader import StreamLoader

from .fakes import DIGITS, DyingImages, FailingImages, FakeStream, Images, listed, real_indices, real_loader


class Untouchable(FakeStream):
    def take(self, n):
        raise AssertionError("the stream was touched")

    def state_dict(self):
        raise AssertionError("the stream was touched")


@pytest.mark.parametrize("workers", [0, 2])
def test_ratio_zero_is_the_wrapped_loader_in_order_length_and_random_numbers(workers):
    def run(wrap):
        torch.manual_seed(3)
        loader = wrap(real_loader(draws=True, shuffle=True, num_workers=workers))
        epochs = [[listed(batch) for batch in loader] for _ in range(2)]
        return len(loader), epochs, torch.rand(3).tolist()

    def wrapped(loader):
        return StreamLoader(loader, Untouchable(), ratio=0)

    assert run(wrapped) == run(lambda loader: loader)


def test_ratio_zero_yields_the_real_loaders_own_objects():
    real = list(real_loader())
    for displaced in ("drop", "defer"):
        loader = StreamLoader(real, Untouchable(), ratio=0, displaced=displaced)
        assert all(a is b for a, b in zip(loader, real, strict=True))
        assert loader.state_dict()["stream"] is None


def test_mixing_leaves_the_order_and_the_draws_of_the_real_images_as_they_were():
    torch.manual_seed(3)
    plain = [images for images, _ in real_loader(draws=True, shuffle=True)]
    torch.manual_seed(3)
    mixed = StreamLoader(real_loader(draws=True, shuffle=True), FakeStream(), ratio=0.5, with_ids=True)
    for (images, _, ids), real in zip(mixed, plain, strict=True):
        assert torch.equal(images[ids < 0], real[ids < 0])


def test_the_length_is_the_real_loaders_and_a_loader_without_one_raises_type_error():
    class Endless(IterableDataset):
        def __iter__(self):
            return iter([(torch.rand(1, 8, 8), 0)] * 6)

    assert len(StreamLoader(real_loader(), FakeStream(), ratio=0.9)) == 5
    loader = StreamLoader(DataLoader(Endless(), batch_size=2), FakeStream(), ratio=0.5)
    with pytest.raises(TypeError):
        len(loader)
    assert len(list(loader)) == 3


def test_what_scripts_and_frameworks_read_is_forwarded():
    real = real_loader(shuffle=True, generator=torch.Generator(), drop_last=True)
    loader = StreamLoader(real, FakeStream())
    names = "dataset batch_size sampler batch_sampler num_workers collate_fn pin_memory drop_last generator"
    for name in names.split():
        assert getattr(loader, name) is getattr(real, name)
    assert not isinstance(loader, DataLoader)
    assert not hasattr(loader, "_iterator") and not hasattr(loader, "no_such_thing")


def test_what_scripts_set_is_set_on_the_real_loader_or_refused_by_it():
    class Mixing(list):
        mixup = True

    loader = StreamLoader(Mixing(real_loader()), FakeStream(), 0.5)
    loader.mixup = False
    assert not loader.real_loader.mixup
    loader.note = "a name of the script's own"
    assert loader.note and not hasattr(loader.real_loader, "note")
    loader = StreamLoader(real_loader(), FakeStream(), 0.5)
    with pytest.raises(ValueError, match="batch_size attribute should not be set"):
        loader.batch_size = 4
    assert loader.batch_size == 8


def test_set_epoch_reaches_the_sampler():
    sampler = DistributedSampler(Images(), num_replicas=2, rank=0)
    loader = StreamLoader(real_loader(sampler=sampler), FakeStream())
    loader.set_epoch(4)
    assert sampler.epoch == 4
    loader.sampler.set_epoch(5)
    assert sampler.epoch == 5
    StreamLoader(real_loader(), FakeStream()).set_epoch(1)


def test_iter_is_lazy():
    class Counting(list):
        started = 0

        def __iter__(self):
            self.started += 1
            return super().__iter__()

    real = Counting(real_loader())
    loader = StreamLoader(real, Untouchable())
    iter(loader)
    iter(loader)
    assert real.started == 0


def test_of_two_iterators_only_the_newer_goes_on():
    loader = StreamLoader(real_loader(), FakeStream())
    older = iter(loader)
    next(older)
    newer = iter(loader)
    next(newer)
    with pytest.raises(UsageError, match="one loop at a time"):
        next(older)
    assert len(list(newer)) == 4


def test_a_loop_left_early_is_followed_by_a_whole_epoch():
    loader = StreamLoader(real_loader(), FakeStream(), with_ids=True)
    for _ in loader:
        break
    assert len(list(loader)) == 5
    assert loader.state_dict()["epoch"] == 2


def test_use_after_close_is_refused():
    loader = StreamLoader(real_loader(), FakeStream())
    batches = iter(loader)
    next(batches)
    loader.close()
    for use in (lambda: next(batches), lambda: next(iter(loader)), loader.state_dict):
        with pytest.raises(UsageError, match="closed"):
            use()


def test_an_error_in_the_real_loader_comes_through_unchanged():
    loader = StreamLoader(DataLoader(FailingImages(), batch_size=8), FakeStream())
    with pytest.raises(RuntimeError, match=r"^unreadable image 20$"):
        list(loader)


def test_a_worker_of_the_real_loader_that_dies_is_reported_as_without_the_wrapper():
    # A process of its own: PyTorch raises from its SIGCHLD handler, wherever the main thread happens to be.
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()
    child = fork.Process(target=_read_images_that_kill, args=(there,))
    child.start()
    try:
        assert here.poll(90)
        kind, message = here.recv()
        child.join()
    finally:
        child.kill()
    assert kind == "RuntimeError" and child.exitcode == 0
    assert re.match(r"DataLoader worker \(pid.*\d+\) (.*killed by signal: Killed|exited unexpectedly)", message)


def _read_images_that_kill(pipe):
    try:
        list(StreamLoader(DataLoader(DyingImages(), batch_size=8, num_workers=1), FakeStream()))
    except Exception as error:
        pipe.send((type(error).__name__, str(error)))


def test_defer_delivers_every_real_image_once_an_epoch_in_order_and_knows_its_length():
    for ratio, count, drop_last in [
        (0.5, 40, False),
        (0.3, 45, False),
        (0.8, 37, True),
        (0.1, 5, False),
        (0, 45, False),
    ]:
        real = real_loader(count, drop_last=drop_last)
        loader = StreamLoader(real, FakeStream(), ratio, displaced="defer", with_ids=True)
        for _ in range(3):
            expected = len(loader)
            delivered = list(loader)
            assert len(delivered) == expected
            seen = [index for batch in delivered for index in real_indices(batch)]
            assert seen == list(range(count - count % 8 if drop_last else count))
            assert all(len(images) == 8 for images, _, _ in delivered[:-1])
        stats = loader.stats()
        assert abs(stats.synthetic - ratio * (stats.real + stats.synthetic)) < 1
        assert stats.displaced == 0


def test_images_held_back_survive_a_loader_that_fills_the_same_memory_again():
    class Refilled:
        images, labels = torch.rand(8, 1, 8, 8), torch.zeros(8, dtype=torch.int64)

        def __iter__(self):
            for numbers in torch.arange(32).split(8):
                self.images[:, 0, 0, 0] = numbers / 32
                self.labels.copy_(numbers % 3)
                yield self.images, self.labels

    delivered = []
    loader = StreamLoader(Refilled(), FakeStream(), 0.5, displaced="defer", with_ids=True)
    for images, labels, ids in loader:
        real = ids < 0
        numbers = (images[real][:, 0, 0, 0] * 32).round().long()
        assert torch.equal(labels[real], numbers % 3)
        delivered += numbers.tolist()
    assert delivered == list(range(32))


def test_defer_follows_a_schedule_and_refuses_what_cannot_be_promised():
    loader = StreamLoader(real_loader(), FakeStream(), lambda step: 0.5 if step < 4 else 0.0, displaced="defer")
    assert len(loader) == len(list(loader))
    with pytest.raises(UsageError, match="starved"):
        StreamLoader(real_loader(), FakeStream(starved="real"), displaced="defer")
    with pytest.raises(UsageError, match="append"):
        StreamLoader(real_loader(), FakeStream(), mode="append", displaced="defer")
    with pytest.raises(TypeError, match="batch_size"):
        len(StreamLoader(list(real_loader()), FakeStream(), displaced="defer"))


def test_without_real_images_the_epoch_has_the_steps_asked_for():
    stream = FakeStream()
    loader = StreamLoader(None, stream, epoch_steps=3, with_ids=True)
    assert len(loader) == 3 and loader.batch_size == 16
    images, labels, ids = next(iter(loader))
    assert images.shape == (16, 1, 8, 8) and images.dtype == torch.float32 and images.max() <= 1
    assert labels.tolist() == [i % 10 for i in range(16)] and ids.tolist() == list(range(16))
    loader = StreamLoader(None, stream, epoch_steps=3, batch_size=5, normalize=((0.5,), (0.5,)))
    epochs = [list(loader), list(loader)]
    assert [len(epoch) for epoch in epochs] == [3, 3]
    assert epochs[0][0][0].min() == -1
    assert len(list(StreamLoader(None, stream, epoch_steps=np.int64(2), batch_size=np.int64(4)))) == 2
    doubled = StreamLoader(None, stream, epoch_steps=1, transform=lambda image: image.half() * 2)
    assert next(iter(doubled))[0].dtype == torch.float16


def test_without_real_images_mixed_labels_are_soft_or_refused_and_classes_are_mapped():
    with pytest.raises(UsageError, match=r"mixed labels, which integers cannot hold: .*soft_labels=True"):
        next(iter(StreamLoader(None, FakeStream(mixed=True), epoch_steps=1)))
    _, labels = next(iter(StreamLoader(None, FakeStream(mixed=True), epoch_steps=1, soft_labels=True)))
    assert labels.shape == (16, 10) and labels[3, 3:5].tolist() == [0.75, 0.25]
    _, labels = next(iter(StreamLoader(None, FakeStream(), epoch_steps=1, classes=DIGITS[::-1])))
    assert labels[:3].tolist() == [9, 8, 7]
    loader = StreamLoader(None, FakeStream(), epoch_steps=1)
    with pytest.raises(UsageError, match="no ratio to set"):
        loader.ratio = 0.5


def test_classification_accuracy_score_a_classifier_of_synthetic_images_alone_knows_real_ones():
    class Shaded(FakeStream):
        """The label is where the bright column stands."""

        def take(self, n):
            batch = super().take(n)
            batch.images[:] = np.random.default_rng(self.calls).integers(0, 100, batch.images.shape)
            batch.labels %= 8
            batch.images[np.arange(n), :, :, batch.labels] += 100
            return batch

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for images, labels in StreamLoader(None, Shaded(), epoch_steps=60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    real, labels = torch.rand(80, 1, 8, 8) * 0.4, torch.arange(80) % 8
    real[torch.arange(80), :, :, labels] += 0.4
    assert (model(real).argmax(1) == labels).float().mean() > 0.95


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((None, FakeStream()), {}, "epoch_steps"),
        ((None, FakeStream()), {"epoch_steps": 0}, "epoch_steps"),
        ((None, FakeStream()), {"epoch_steps": 5, "ratio": 0.5}, "leave ratio out"),
        ((None, FakeStream()), {"epoch_steps": 5, "batch_size": -1}, "batch_size is a number of images from 1, got -1"),
        ((None, FakeStream()), {"epoch_steps": 5, "batch_size": 0}, "batch_size is a number of images from 1, got 0"),
        ((None, FakeStream()), {"epoch_steps": 5, "batch_size": "8"}, "images from 1, got '8'"),
        ((None, FakeStream()), {"epoch_steps": 5, "batch_size": 2.5}, "images from 1, got 2.5"),
        ((None, FakeStream(starved="real")), {"epoch_steps": 5}, "starved"),
        (([], FakeStream()), {"seed": None}, "seed is an integer, got None"),
        (([], FakeStream()), {"epoch_steps": 5}, "leave them out"),
        ((3, FakeStream()), {}, "a loader of batches, got a int"),
        ((FakeStream(), []), {}, "the second argument is a Stream"),
        (([], FakeStream()), {"ratio": 1.0}, "epoch_steps=1000"),
        (([], FakeStream()), {"mode": "add"}, "'replace', 'append'"),
        (([], FakeStream()), {"displaced": "deferr"}, "did you mean 'defer'"),
        (([], FakeStream()), {"transform": "none"}, "transform is a function"),
        (([], FakeStream()), {"batch_transform": "flip"}, "batch_transform is a function of a batch"),
        (([], FakeStream()), {"soft_labels": True}, "without real images"),
        (([], FakeStream()), {"ratio": "half"}, r"ratio is a number in \[0, 1\), got 'half'"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused_with_what_can(arguments, options, message):
    with pytest.raises(UsageError, match=message):
        StreamLoader(*arguments, **options)


def test_a_state_of_ratio_0_takes_a_loader_that_went_on_at_another_ratio_back_to_where_the_stream_was_found():
    stream = FakeStream()
    stream.take(7)
    loader = StreamLoader(real_loader(), stream, 0, with_ids=True)
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    assert state["stream"] is None

    def rest(batches):
        loader.ratio = {"0": 0.5, "default": 0.25}
        return [listed(batch) for batch in batches]

    expected = rest(batches)
    assert loader.stats().synthetic and stream.class_weights
    after = loader.state_dict()
    for _ in range(2):
        loader.load_state_dict(state)
        assert stream.next_id == 7 and stream.class_weights is None
        loader.ratio = 0
        assert loader.state_dict()["stream"] is None
        assert rest(loader) == expected
    stream = FakeStream()
    stream.take(7)
    loader = StreamLoader(real_loader(), stream, 0, with_ids=True)
    loader.load_state_dict(after)
    loader.load_state_dict(state)
    assert rest(loader) == expected


def test_feedback_given_while_a_schedule_is_still_at_0_is_in_the_state():
    class Told(FakeStream):
        def feedback(self, labels, losses):
            self.class_weights = losses

    def build():
        return StreamLoader(real_loader(), Told(), lambda step: 0.5 * (step > 1))

    loader = build()
    next(iter(loader))
    loader.stream.feedback([0], [2.0])
    resumed = build()
    resumed.load_state_dict(loader.state_dict())
    assert resumed.stream.class_weights == [2.0]


@pytest.mark.parametrize("state", [None, [1], "state.pt"])
def test_what_is_no_state_is_refused(state):
    with pytest.raises(StateError, match=f"a StreamLoader's state_dict is needed, got a {type(state).__name__}"):
        StreamLoader(real_loader(), FakeStream(), 0.5).load_state_dict(state)

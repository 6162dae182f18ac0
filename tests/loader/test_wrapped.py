"""Every kind of loader that can be wrapped, for real: synthetic images arrive in it, and it goes on as it was."""

import multiprocessing
import random
import weakref

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler, get_worker_info
from torchdata.nodes import Batcher, IterableWrapper, Loader, Mapper
from torchdata.stateful_dataloader import StatefulDataLoader

from streamaug.errors import MismatchError, UsageError
from streamaug.loader import StreamLoader
from streamaug.loader.frequencies import class_counts

from .fakes import DIGITS, FakeStream, Images, listed, real_indices, real_loader


class Shards(IterableDataset):
    """Forty images, dealt out to the workers."""

    def __iter__(self):
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        return (Images()[index] for index in range(first, 40, step))


class WholeBatches(Dataset):
    """A map-style dataset of batches, for batch_size=None."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        images, labels = zip(*(Images()[8 * index + i] for i in range(8)), strict=True)
        return torch.stack(images), torch.tensor(labels)


class Uneven(BatchSampler):
    """Batches of 4, 8, 12, 8 and 8."""

    def __iter__(self):
        order = list(range(40))
        for size in (4, 8, 12, 8, 8):
            yield [order.pop(0) for _ in range(size)]

    def __len__(self):
        return 5


def as_dict(items):
    return {"image": torch.stack([image for image, _ in items]), "label": torch.tensor([label for _, label in items])}


def nodes_loader():
    samples = IterableWrapper(Images()[index] for index in range(40))
    return Loader(Mapper(Batcher(samples, 8), torch.utils.data.default_collate))


LOADERS = {
    "map": lambda: real_loader(),
    "map, workers": lambda: real_loader(num_workers=2),
    "map, persistent workers": lambda: real_loader(num_workers=1, persistent_workers=True),
    "iterable": lambda: DataLoader(Shards(), batch_size=8),
    "iterable, workers": lambda: DataLoader(Shards(), batch_size=4, num_workers=2),
    "batch_sampler": lambda: DataLoader(Images(), batch_sampler=Uneven(SequentialSampler(range(40)), 8, False)),
    "batch_size None": lambda: DataLoader(WholeBatches(), batch_size=None),
    "batch_size None, workers": lambda: DataLoader(WholeBatches(), batch_size=None, num_workers=1),
    "stateful": lambda: real_loader(loader=StatefulDataLoader),
    "nodes": nodes_loader,
    "list": lambda: list(real_loader()),
    "generator": lambda: (batch for batch in real_loader()),
}


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("kind", LOADERS)
def test_synthetic_images_arrive_and_every_real_image_is_where_it_was(kind):
    plain = list(LOADERS[kind]())
    stream = FakeStream()
    loader = StreamLoader(LOADERS[kind](), stream, ratio=0.5, mode="append", with_ids=True)
    delivered = list(loader)
    assert len(delivered) == len(plain)
    for (images, labels, ids), (real_images, real_labels) in zip(delivered, plain, strict=True):
        real = ids < 0
        assert torch.equal(images[real], real_images) and torch.equal(labels[real], real_labels)
        assert torch.allclose(images[~real][:, 0, 4, 4], (ids[~real] % 200 + 50) / 255)
    assert stream.next_id == loader.stats().synthetic == 40


def test_a_hugging_face_dataset_in_a_dataloader_is_found_by_name_and_its_classes_by_their_names():
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=DIGITS[::-1]),
        }
    )
    rows = {
        "image": [Image.fromarray(np.full((8, 8), 60 + 4 * i, np.uint8)) for i in range(16)],
        "label": [i % 10 for i in range(16)],
    }
    dataset = datasets.Dataset.from_dict(rows, features=features).with_format("torch")
    real = DataLoader(dataset, batch_size=8)
    assert class_counts(real, 10).tolist() == [2] * 6 + [1] * 4
    for batch in StreamLoader(real, FakeStream(), ratio=0.5, with_ids=True):
        assert list(batch) == ["image", "label", "synthetic_ids"] and batch["image"].dtype == torch.uint8
        ids = batch["synthetic_ids"]
        made = ids >= 0
        assert int(made.sum()) == 4
        assert torch.equal(batch["image"][made][:, 0, 4, 4].long(), ids[made] % 200 + 50)
        assert torch.equal(batch["label"][made], 9 - ids[made] % 10)
    unformatted = DataLoader(dataset.with_format(None), batch_size=8, collate_fn=lambda rows: rows)
    with pytest.raises(MismatchError, match=r"no images found .*default_collate makes a batch of them"):
        list(StreamLoader(unformatted, FakeStream(), ratio=0.5))


def test_a_torchdata_loader_resumes_by_its_own_state():
    def loader():
        return StreamLoader(nodes_loader(), FakeStream(), ratio=0.25, with_ids=True)

    whole = [listed(batch) for batch in loader()]
    first = loader()
    batches = iter(first)
    delivered = [listed(next(batches)) for _ in range(2)]
    second = loader()
    second.load_state_dict(first.state_dict())
    assert second.state_dict()["identity"]["real_loader"] == "stateful"
    delivered += [listed(batch) for batch in second]
    assert delivered == whole
    with pytest.raises(TypeError):
        len(second)


def test_the_user_draws_random_numbers_between_batches_as_without_the_wrapper():
    def run(wrap):
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)
        seen = []
        for batch in wrap(real_loader(draws=True, shuffle=True)):
            seen += [listed(batch), torch.rand(2).tolist(), random.random(), np.random.rand()]
        return seen

    assert run(lambda real: StreamLoader(real, FakeStream(), ratio=0)) == run(lambda real: real)
    mixed = run(lambda real: StreamLoader(real, FakeStream(), ratio=0.5, mode="append"))
    assert [mixed[1::4], mixed[2::4], mixed[3::4]] == [run(lambda real: real)[i::4] for i in (1, 2, 3)]


class Told(DataLoader):
    """Gives batches that are pinned, as far as `is_pinned` tells, and counts how often an epoch is begun."""

    begun = 0

    def __iter__(self):
        self.begun += 1
        for images, labels in super().__iter__():
            images.is_pinned = lambda: True
            yield images, labels


def test_at_ratio_zero_batches_are_the_ones_the_loader_pinned_and_nothing_is_read_ahead():
    read = []

    class Reading(Images):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    real = Told(Reading(), batch_size=8)
    loader = StreamLoader(real, FakeStream(), ratio=0)
    for number, (images, _) in enumerate(loader, start=1):
        assert images.is_pinned() and len(read) == 8 * number
    assert real.begun == 1 and loader.stream.calls == 0


@pytest.mark.gpu
def test_pinned_real_batches_stay_pinned_at_every_ratio():
    for ratio in (0, 0.5):
        images, _ = next(iter(StreamLoader(real_loader(pin_memory=True), FakeStream(), ratio)))
        assert images.is_pinned()


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
def test_workers_are_as_many_as_without_the_wrapper_and_end_when_an_epoch_is_left(kind):
    for ratio in (0, 0.5):
        loader = StreamLoader(real_loader(loader=kind, num_workers=2), FakeStream(), ratio)
        before = set(multiprocessing.active_children())  # workers of an earlier test may be ending
        batches = iter(loader)
        next(batches)
        assert len(set(multiprocessing.active_children()) - before) == 2
        del batches
        freed = weakref.ref(loader)
        del loader
        # By reference count alone: in a cycle of ours, torchdata's workers would be waited for in vain (5 s each).
        assert freed() is None


def test_an_exhausted_iterator_and_the_iterator_of_a_loader_are_refused():
    loader = StreamLoader((batch for batch in real_loader()), FakeStream(), ratio=0.5)
    assert len(list(loader)) == 5
    with pytest.raises(UsageError, match=r"is an iterator \(generator\) that was read to its end"):
        list(loader)
    for kind in (DataLoader, StatefulDataLoader):
        with pytest.raises(UsageError, match=r"already started .*: pass the DataLoader itself"):
            StreamLoader(iter(real_loader(loader=kind)), FakeStream())


def test_single_samples_and_arrays_are_refused_with_what_would_work():
    for real in (DataLoader(Images(), batch_size=None), [Images()[0]]):
        with pytest.raises(MismatchError, match=r"yields single samples .* wrap a DataLoader with a batch_size"):
            list(StreamLoader(real, FakeStream(), ratio=0.5))
    with pytest.raises(UsageError, match=r"got a dataset \(Images\): DataLoader\(dataset, batch_size=64"):
        StreamLoader(Images(), FakeStream())
    arrays = [(np.zeros((8, 1, 8, 8), np.float32), np.arange(8))]
    with pytest.raises(MismatchError, match=r"no images found .*torch\.from_numpy in the collate_fn"):
        list(StreamLoader(arrays, FakeStream(), ratio=0.5))
    lists = [(torch.rand(8, 1, 8, 8), list(range(8)))]
    with pytest.raises(MismatchError, match=r"a batch without labels .*torch\.tensor in the collate_fn"):
        list(StreamLoader(lists, FakeStream(), ratio=0.5))
    named = [(torch.rand(8, 1, 8, 8), ["cat"] * 8)]
    with pytest.raises(MismatchError, match=r"a batch without labels .*classes\.index\(name\)"):
        list(StreamLoader(named, FakeStream(), ratio=0.5))
    with pytest.raises(UsageError, match=r"is a Stream, got 'digits': Stream\.from_config\('digits'\)"):
        StreamLoader(real_loader(), "digits")


def test_a_loader_that_is_wrapped_twice_is_said(caplog):
    once = StreamLoader(real_loader(), FakeStream(), ratio=0.5)
    assert caplog.text == ""
    StreamLoader(once, FakeStream(), ratio=0.5)
    assert "is a StreamLoader already: both ratios apply" in caplog.text


def test_a_batch_too_small_for_the_ratio_is_said_once_with_the_remainder(caplog):
    loader = StreamLoader(real_loader(batch_size=4), FakeStream(), ratio=0.1, with_ids=True)
    made = [int((ids >= 0).sum()) for _ in range(2) for _, _, ids in loader]
    assert sum(made) == 8 and set(made) == {0, 1}
    assert caplog.text.count("ratio 0.1 of a batch of 4 images is 0.4 of a synthetic image") == 1
    assert "one comes every 2.5 batches" in caplog.text
    caplog.clear()
    list(StreamLoader(real_loader(), FakeStream(), ratio=0.15))
    assert caplog.text == ""


def test_append_and_defer_say_it_as_well(caplog):
    list(StreamLoader(real_loader(batch_size=4), FakeStream(), ratio=0.1, mode="append"))
    list(StreamLoader(real_loader(batch_size=4), FakeStream(), ratio=0.1, displaced="defer"))
    assert caplog.text.count("is 0.4 of a synthetic image") == 2


def test_nothing_of_the_real_order_is_lost_under_a_loader_of_batches():
    real = DataLoader(WholeBatches(), batch_size=None)
    loader = StreamLoader(real, FakeStream(), ratio=0.5, displaced="defer", with_ids=True)
    seen = [index for batch in loader for index in real_indices(batch)]
    assert seen == list(range(40))

import logging
import threading

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Subset
from torchvision import transforms as v1
from torchvision.transforms import v2

from streamaug.errors import DataError, MismatchError, UsageError
from streamaug.loader import StreamLoader
from streamaug.loader.transforms import SeededDraws

from .fakes import DIGITS, FakeStream, Images, real_loader

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Photos(Images):
    """Real PIL images of 12×12 with a transform, as torchvision's datasets have."""

    def __getitem__(self, index):
        pixels = np.random.default_rng(index).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        return self.transform(v1.ToPILImage()(pixels)), index % 10


def photos(transform, subset=False):
    dataset = Photos(transform=transform)
    return DataLoader(Subset(dataset, range(24)) if subset else dataset, batch_size=8)


RANDOM_V1 = v1.Compose([v1.RandomCrop(8), v1.RandomHorizontalFlip(), v1.ToTensor(), v1.Normalize(*IMAGENET)])
RANDOM_V2 = v2.Compose(
    [
        v2.RandomResizedCrop(8),
        v2.ColorJitter(0.4, 0.4),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(*IMAGENET),
    ]
)


@pytest.mark.parametrize("subset", [False, True])
@pytest.mark.parametrize("transform", [RANDOM_V1, RANDOM_V2], ids=["v1", "v2"])
def test_synthetic_images_go_through_the_datasets_transform(transform, subset):
    loader = StreamLoader(photos(transform, subset), FakeStream(shape=(3, 12, 12)), ratio=0.5, with_ids=True)
    images, _, _ = next(iter(loader))
    assert images.shape == (8, 3, 8, 8) and images.min() < 0
    assert loader.stats().transform_seconds > 0


@pytest.mark.parametrize("same", [True, False])
def test_the_transform_of_concatenated_datasets_is_used_where_it_is_one(same, caplog):
    caplog.set_level("INFO", "streamaug")
    parts = [Photos(transform=RANDOM_V1), Photos(transform=RANDOM_V1 if same else RANDOM_V2)]
    loader = StreamLoader(DataLoader(ConcatDataset(parts), batch_size=8), FakeStream((3, 8, 8)), 0.5)
    if same:
        next(iter(loader))
        assert loader.stats().transform_seconds > 0 and "no `transform`" not in caplog.text
    else:
        with pytest.raises(MismatchError, match="range"):
            next(iter(loader))
        assert "the real dataset has no `transform` that holds for all its images" in caplog.text


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_transform_that_the_dataset_calls_otherwise_is_named_in_a_warning(wrapped, caplog):
    dataset = Images()
    dataset.target_transform = v2.Lambda(int)
    real = DataLoader(Subset(dataset, range(24)) if wrapped else dataset, batch_size=8)
    next(iter(StreamLoader(real, FakeStream(), 0.5)))
    assert caplog.text == ""
    dataset.augment = v2.RandomHorizontalFlip()
    next(iter(StreamLoader(real, FakeStream(), 0.5, transform=None)))
    assert caplog.text == ""
    next(iter(StreamLoader(real, FakeStream(), 0.5)))
    assert "has no `transform`, but an attribute `augment`" in caplog.text


def test_a_function_given_to_set_transform_is_named_in_a_warning(caplog):
    dataset = Images()
    dataset.format = {"type": "custom"}  # as datasets.Dataset.format
    next(iter(StreamLoader(DataLoader(dataset, batch_size=8), FakeStream(), 0.5)))
    assert "has no `transform`, but a function given to set_transform" in caplog.text


def test_grey_images_are_handed_to_the_transform_as_grey_pil_images():
    modes = []

    def transform(image):
        modes.append(getattr(image, "mode", None))
        return v1.functional.to_tensor(image)

    real = DataLoader(Images(transform=transform), batch_size=8)
    images, _, ids = next(iter(StreamLoader(real, FakeStream(), ratio=0.5, with_ids=True)))
    assert set(modes) == {"L"}
    assert torch.allclose(images[ids >= 0][:, 0, 4, 4], (ids[ids >= 0] % 200 + 50) / 255)


@pytest.mark.parametrize(
    ("transform", "kind"),
    [
        (lambda x: x.float() / 255 if x.dtype == torch.uint8 else 1 / 0, "uint8"),
        (lambda x: x * 1.0 if x.is_floating_point() else 1 / 0, "float"),
        (v2.ToDtype(torch.float32, scale=True), "uint8"),
    ],
)
def test_a_transform_of_tensors_gets_tensors(transform, kind):
    real = DataLoader(Images(transform=transform), batch_size=8)
    images, _, ids = next(iter(StreamLoader(real, FakeStream(), ratio=0.5, with_ids=True)))
    assert torch.allclose(images[ids >= 0][:, 0, 4, 4], (ids[ids >= 0] % 200 + 50) / 255)


def test_a_dataset_transform_that_cannot_take_images_is_refused_with_every_attempt():
    real = DataLoader(Images(transform=lambda record: record.image), batch_size=8)
    with pytest.raises(DataError, match=r"dataset\.transform(?s:.*)PIL image(?s:.*)uint8 tensor(?s:.*)transform=f"):
        next(iter(StreamLoader(real, FakeStream(), ratio=0.5)))


def test_random_transforms_depend_on_seed_and_step_alone_whatever_the_threads():
    def run(workers, seed=5):
        loader = StreamLoader(
            photos(RANDOM_V2),
            FakeStream(shape=(3, 12, 12)),
            0.5,
            seed=seed,
            transform_workers=workers,
            with_ids=True,
        )
        torch.manual_seed(1)
        return torch.cat([images[ids >= 0] for images, _, ids in loader])

    once = run(1)
    assert torch.equal(once, run(3))
    assert not torch.equal(once, run(1, seed=6))


def test_the_transforms_of_synthetic_images_leave_the_draws_of_real_ones_alone():
    def real_rows(ratio):
        torch.manual_seed(1)
        loader = StreamLoader(photos(RANDOM_V1), FakeStream(shape=(3, 12, 12)), ratio, mode="append", with_ids=True)
        return torch.cat([images[ids < 0] for images, _, ids in loader])

    assert torch.equal(real_rows(0.5), real_rows(0.0))


def test_seeded_draws_are_of_this_thread_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with SeededDraws(9):
        first = torch.rand(4), torch.randint(0, 9, (4,)), torch.empty(4).uniform_(0, 2), torch.randperm(5)
        drawn = []
        thread = threading.Thread(target=lambda: drawn.append(torch.rand(3)))
        thread.start()
        thread.join()
    with SeededDraws(9):
        second = torch.rand(4), torch.randint(0, 9, (4,)), torch.empty(4).uniform_(0, 2), torch.randperm(5)
    assert torch.equal(drawn[0], expected)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_given_transform_gets_uint8_tensors_and_what_it_leaves_uint8_is_converted():
    def invert(image):
        assert image.dtype == torch.uint8 and image.shape == (1, 8, 8)
        return 255 - image

    loader = StreamLoader(real_loader(), FakeStream(), 0.5, transform=invert, with_ids=True)
    images, _, ids = next(iter(loader))
    assert torch.allclose(images[ids >= 0][:, 0, 4, 4], 1 - (ids[ids >= 0] % 200 + 50) / 255)


def test_normalised_real_images_need_normalize_and_get_it():
    real = [((torch.rand(8, 3, 8, 8) - 0.45) / 0.22, torch.arange(8)) for _ in range(3)]
    stream = FakeStream(shape=(3, 8, 8))
    with pytest.raises(MismatchError, match=r"range(?s:.*)normalize="):
        next(iter(StreamLoader(real, stream, 0.5)))
    loader = StreamLoader(real, stream, 0.5, normalize=((0.45,) * 3, (0.22,) * 3), with_ids=True)
    images, _, ids = next(iter(loader))
    expected = ((ids[ids >= 0] % 200 + 50) / 255 - 0.45) / 0.22
    assert torch.allclose(images[ids >= 0][:, 1, 4, 4], expected, atol=1e-5)
    with pytest.raises(UsageError, match="3 channels"):
        next(iter(StreamLoader(real, stream, 0.5, normalize=((0.5, 0.5), (0.2, 0.2)))))
    with pytest.raises(UsageError, match="both given"):
        next(iter(StreamLoader(real, stream, 0.5, normalize=((0.5,), (0.2,)), transform=lambda x: x / 255)))


@pytest.mark.parametrize("normalize", [((0.5,), (0.0,)), ((float("nan"),), (1.0,)), (0.5, -1.0), 0.5, (0.5, 0.5, 0.5)])
def test_a_normalisation_that_gives_no_numbers_is_refused(normalize):
    with pytest.raises(UsageError, match="normalize="):
        next(iter(StreamLoader([(torch.rand(8, 1, 8, 8), torch.arange(8))], FakeStream(), 0.5, normalize=normalize)))


@pytest.mark.parametrize(
    ("real", "options", "what"),
    [
        (
            torch.rand(8, 3, 64, 64),
            {},
            r"shape:\n  real:      float32 \[3, 64, 64\].*\n  synthetic: float32 \[1, 8, 8\]",
        ),
        (torch.rand(8, 8, 8), {}, "shape"),
        (
            torch.rand(8, 1, 8, 8),
            {"transform": lambda x: x.float()},
            r"range:\n  real: .*\n  synthetic: .*0 to 255",
        ),
        (torch.rand(8, 1, 8, 8), {"transform": lambda x: x.float() / 127.5 - 1}, "range"),
        (torch.rand(8, 1, 8, 8), {"normalize": ((0.5,), (0.5,))}, "range"),
        (torch.rand(8, 1, 8, 8) * 16, {}, "range"),
        (torch.randn(8, 1, 8, 8), {}, "range"),
        ((torch.rand(8, 1, 8, 8) * 255).to(torch.uint8), {"transform": lambda x: x / 255}, "dtype"),
        (torch.randint(0, 255, (8, 1, 8, 8)), {"transform": lambda x: x / 255}, "dtype"),
        (torch.randint(0, 4096, (8, 1, 8, 8)), {}, "range"),
    ],
)
def test_images_that_do_not_agree_are_refused_before_the_stream_starts(real, options, what):
    stream = FakeStream()
    with pytest.raises(MismatchError, match=what):
        next(iter(StreamLoader([(real, torch.arange(8))], stream, 0.5, **options)))
    assert stream.calls == 0


def test_classes_in_another_order_are_mapped_by_name_and_it_is_said_once(caplog):
    class Named(Images):
        classes = DIGITS[::-1]

    loader = StreamLoader(DataLoader(Named(), batch_size=8), FakeStream(), 0.5, with_ids=True)
    with caplog.at_level(logging.INFO, logger="streamaug"):
        for _, labels, ids in loader:
            assert labels[ids >= 0].tolist() == [9 - i % 10 for i in ids[ids >= 0].tolist()]
    assert sum("mapped by name" in message for message in caplog.messages) == 1
    assert sum("images are field 0" in message for message in caplog.messages) == 1


def test_classes_of_other_names_are_refused_unless_said_to_be_the_same():
    class Named(Images):
        classes = tuple(f"{digit} - digit" for digit in range(10))

    real = DataLoader(Named(), batch_size=8)
    with pytest.raises(
        MismatchError, match=r"real:   10 classes: 0 - digit(?s:.*)stream: 10 classes: 0, 1(?s:.*)classes="
    ):
        next(iter(StreamLoader(real, FakeStream(), 0.5)))
    next(iter(StreamLoader(real, FakeStream(), 0.5, classes=DIGITS)))


def test_integer_labels_in_a_column_stay_in_one():
    real = [(torch.rand(8, 1, 8, 8), torch.arange(8)[:, None])]
    loader = StreamLoader(real, FakeStream(), 0.5, with_ids=True)
    _, labels, ids = batch = next(iter(loader))
    made = ids >= 0
    assert labels.shape == (8, 1) and labels[made][:, 0].tolist() == ids[made].tolist()
    assert loader.labels_and_ids(batch)[0].tolist() == labels[:, 0].tolist()
    with pytest.raises(MismatchError, match=r"cannot hold a mixture"):
        list(StreamLoader(real, FakeStream(mixed=True), 0.5))
    with pytest.raises(MismatchError, match="labels 3 to 10"):
        list(StreamLoader([(torch.rand(8, 1, 8, 8), torch.arange(8)[:, None] + 3)], FakeStream(), 0.5))


@pytest.mark.parametrize("value", [0, 1])
def test_of_a_single_class_a_column_of_zeros_is_labels_and_one_of_ones_is_one_hot(value):
    real = [(torch.rand(8, 1, 8, 8), torch.full((8, 1), value))]
    loader = StreamLoader(real, FakeStream(class_names=["all"]), 0.5)
    [batch] = loader
    assert batch[1].tolist() == [[value]] * 8 and loader.labels_and_ids(batch)[0].tolist() == [0] * 8


@pytest.mark.parametrize("labels", [torch.arange(8) + 3, torch.arange(8) - 1, torch.rand(8, 12)])
def test_labels_outside_the_classes_are_refused(labels):
    with pytest.raises(MismatchError, match="stream: 10 classes"):
        next(iter(StreamLoader([(torch.rand(8, 1, 8, 8), labels)], FakeStream(), 0.5)))


def test_a_label_outside_the_classes_is_refused_whenever_it_comes():
    real = [(torch.rand(8, 1, 8, 8), torch.arange(8) + 2 * late) for late in range(3)]
    with pytest.raises(MismatchError, match="labels 4 to 11"):
        list(StreamLoader(real, FakeStream(), 0.5))

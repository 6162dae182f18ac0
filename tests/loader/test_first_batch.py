"""What is checked at the first batch, and what is said about images that are merely unlike."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from streamaug.errors import DataError, MismatchError
from streamaug.loader import StreamLoader
from streamaug.loader import likeness as likeness_module
from streamaug.loader.appearance import Appearance
from streamaug.loader.likeness import ENOUGH, Likeness
from streamaug.loader.transforms import Converter

from .fakes import DIGITS, FakeStream, Images, real_loader

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize(
    ("images", "scale"),
    [
        (torch.rand(8, 3, 8, 8), "0 to 1"),
        (torch.rand(8, 3, 8, 8) * 0.5 + 0.2, "0 to 1"),
        (torch.rand(8, 3, 8, 8) * 255, "0 to 255"),
        (torch.rand(8, 3, 8, 8) * 280 - 12, "0 to 255"),  # as bicubic resizing and a change of contrast leave them
        (torch.randint(0, 9, (8, 3, 8, 8), dtype=torch.uint8), "0 to 255"),
        (torch.rand(8, 3, 8, 8) * 2 - 1, "-1 to 1"),
        (torch.rand(8, 3, 8, 8) * 1.9 - 0.95, "-1 to 1"),
        ((torch.rand(8, 3, 8, 8) - 0.45) / 0.22, "normalised"),
        (torch.randn(8, 3, 8, 8), "normalised"),
        (torch.rand(8, 3, 8, 8) - 0.5, "unknown"),
        (torch.rand(8, 3, 8, 8) * 16, "unknown"),
    ],
)
def test_the_scale_is_recognised_by_range_mean_and_deviation(images, scale):
    assert Appearance.of(images).scale == scale


def test_images_between_minus_one_and_one_need_not_be_black_or_white():
    real = [(torch.rand(8, 1, 8, 8) * 1.9 - 0.95, torch.arange(8))]
    images, _, ids = next(iter(StreamLoader(real, FakeStream(), 0.5, with_ids=True)))
    expected = (ids[ids >= 0] % 200 + 50) / 127.5 - 1
    assert torch.allclose(images[ids >= 0][:, 0, 4, 4], expected, atol=1e-5)


def test_both_sides_of_a_range_mismatch_carry_mean_deviation_and_scale_and_the_setting():
    real = [((torch.rand(8, 1, 8, 8) - 0.45) / 0.22, torch.arange(8))]
    with pytest.raises(MismatchError) as refusal:
        next(iter(StreamLoader(real, FakeStream(), 0.5)))
    title, ours, theirs, fix = str(refusal.value).splitlines()
    assert title == "real and synthetic images differ in range:"
    assert "std" in ours and ours.endswith("(normalised)") and theirs.endswith("(0 to 1)")
    assert "normalize=(mean, std)" in fix


def test_a_target_transform_that_changes_labels_is_refused_unless_the_classes_are_given():
    real = Images()
    real.classes = DIGITS

    def first(**options):
        return next(iter(StreamLoader(DataLoader(real, batch_size=8), FakeStream(), 0.5, with_ids=True, **options)))

    for harmless in (int, lambda label: torch.nn.functional.one_hot(torch.tensor(label), 10), {}.__getitem__):
        real.target_transform = harmless
        first()
    real.target_transform = lambda label: 9 - label
    with pytest.raises(MismatchError, match=r"target_transform changes its labels(?s:.*)9, 8, 7(?s:.*)classes="):
        first()
    _, labels, ids = first(classes=DIGITS[::-1])
    _, straight, _ = first(classes=DIGITS)
    assert torch.equal(labels[ids >= 0], 9 - straight[ids >= 0])


def test_another_size_is_refused_with_the_settings_that_make_it():
    real = [(torch.rand(8, 3, 12, 12), torch.arange(8))]
    with pytest.raises(MismatchError, match=r"set data\.image_size: 12 and data\.channels: 3 of the stream's"):
        next(iter(StreamLoader(real, FakeStream(), 0.5)))
    wide = [(torch.rand(8, 3, 12, 16), torch.arange(8))]
    with pytest.raises(MismatchError, match=r"set data\.image_size and data\.channels of the stream's"):
        next(iter(StreamLoader(wide, FakeStream(), 0.5)))


def test_another_layout_is_named_and_the_transform_that_is_proposed_works():
    stream = FakeStream(shape=(3, 12, 8))
    real = [(torch.rand(8, 12, 8, 3), torch.arange(8))]
    with pytest.raises(MismatchError, match=r"differ in layout(?s:.*)permute\(1, 2, 0\)"):
        next(iter(StreamLoader(real, stream, 0.5)))
    loader = StreamLoader(real, stream, 0.5, transform=lambda image: image.permute(1, 2, 0), with_ids=True)
    images, _, ids = next(iter(loader))
    assert torch.allclose(images[ids >= 0][:, 4, 4, 1], (ids[ids >= 0] % 200 + 50) / 255)


def test_images_left_on_another_device_are_refused_with_both_devices():
    for options in ({"transform": lambda x: x.to("meta")}, {"batch_transform": lambda x: x.to("meta")}):
        with pytest.raises(
            MismatchError, match=r"device:\n  real:      on cpu\n  synthetic: on meta \(after (batch_)?tr"
        ):
            next(iter(StreamLoader(real_loader(), FakeStream(), 0.5, **options)))


# The path on a GPU, on the CPU: bytes are moved to the real batch's device, and one kernel does the rest there.


def spied_collect(monkeypatch):
    import importlib

    module = importlib.import_module("streamaug.kernels.collect")
    calls, original = [], module.collect

    def collect(slots, index, **options):
        calls.append((slots, options))
        return original(slots, index, **options)

    monkeypatch.setattr(module, "collect", collect)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8])
def test_normalise_cast_and_layout_are_one_pass_of_the_collect_kernel(monkeypatch, dtype):
    calls = spied_collect(monkeypatch)
    pixels = torch.rand(8, 3, 8, 8)
    normalize = None if dtype == torch.uint8 else IMAGENET
    real = v2.Normalize(*IMAGENET)(pixels).to(dtype) if normalize else (pixels * 255).to(dtype)
    real = real.contiguous(memory_format=torch.channels_last)
    converter = Converter(real, (3, 8, 8), None, from_dataset=False, normalize=normalize)
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 8, 8), dtype=np.uint8)
    made = converter(images, (0, 0, 0))
    slots, options = calls[-1]
    assert slots.dtype == torch.uint8 and slots.device == real.device
    assert options["dtype"] == dtype and options["memory_format"] == torch.channels_last
    assert made.dtype == dtype and made.is_contiguous(memory_format=torch.channels_last)
    expected = torch.from_numpy(images)
    if normalize:
        expected = v2.Normalize(*IMAGENET)(expected / 255).to(dtype)
    torch.testing.assert_close(made, expected, atol=1e-3, rtol=1e-3)
    assert torch.equal(converter(torch.from_numpy(images), (0, 0, 0)), made)  # of slots that are tensors already


def test_v2_transforms_run_on_the_batch_before_the_kernel(monkeypatch):
    calls = spied_collect(monkeypatch)
    shapes = []

    def augment(images):
        shapes.append((images.shape, images.dtype))
        return v2.Compose([v2.RandomResizedCrop(6), v2.RandomHorizontalFlip()])(images)

    real = [((torch.rand(8, 3, 6, 6) - 0.45) / 0.22, torch.arange(8)) for _ in range(3)]

    def run(seed, ratio=0.5):
        torch.manual_seed(1)
        loader = StreamLoader(
            real, FakeStream(shape=(3, 12, 12)), ratio, batch_transform=augment, normalize=((0.45,), (0.22,)), seed=seed
        )
        return torch.cat([images for images, _ in loader]), torch.rand(1)

    images, after = run(1)
    assert shapes[-1] == ((4, 3, 12, 12), torch.uint8) and calls[-1][0].shape == (4, 3, 6, 6)
    assert torch.equal(run(1)[0], images) and not torch.equal(run(2)[0], images)
    assert torch.equal(run(1, ratio=0)[1], after), "the global generator is left alone"


def test_a_batch_transform_follows_a_transform_and_replaces_the_datasets():
    def never(image):
        raise AssertionError("the dataset's transform is not for synthetic images here")

    real = DataLoader(Images(transform=never), batch_size=8)
    options = {"transform": lambda image: 255 - image, "batch_transform": lambda images: images.float() / 255}
    images, _, ids = next(iter(StreamLoader(real, FakeStream(), 0.5, with_ids=True, **options)))
    assert torch.allclose(images[ids >= 0][:, 0, 4, 4], 1 - (ids[ids >= 0] % 200 + 50) / 255)
    next(iter(StreamLoader(real, FakeStream(), 0.5, batch_transform=lambda images: images)))
    with pytest.raises(DataError, match=r"was given \[3, 1, 8, 8\] and returned \[1, 8, 8\]"):
        next(iter(StreamLoader(real, FakeStream(), 0.5, batch_transform=lambda images: images[0])))


def test_grey_images_without_a_channel_axis_are_converted_too():
    real = [(torch.rand(8, 8, 8), torch.arange(8))]
    loader = StreamLoader(real, FakeStream(), 0.5, transform=lambda image: image[0], with_ids=True)
    images, _, ids = next(iter(loader))
    assert torch.allclose(images[ids >= 0][:, 4, 4], (ids[ids >= 0] % 200 + 50) / 255)


@pytest.mark.gpu
def test_on_a_gpu_batches_stay_there():
    real = [((torch.rand(8, 3, 8, 8, device="cuda") - 0.45) / 0.22, torch.arange(8, device="cuda"))]
    stream = FakeStream(shape=(3, 8, 8))
    augment = v2.Compose([v2.RandomHorizontalFlip(), v2.GaussianNoise()])
    for batch_transform in (None, lambda images: (augment(images / 255) * 255).byte()):
        loader = StreamLoader(
            real, stream, 0.5, normalize=((0.45,), (0.22,)), batch_transform=batch_transform, with_ids=True
        )
        images, labels, ids = next(iter(loader))
        assert images.is_cuda and labels.is_cuda and not ids.is_cuda
        expected = ((ids[ids >= 0] % 200 + 50) / 255 - 0.45) / 0.22
        if batch_transform is None:
            assert torch.allclose(images[(ids >= 0).cuda()][:, 1, 4, 4].cpu(), expected, atol=1e-4)


# Unlike, though it fits.


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    pixels = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
    return pixels[torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))]


def differences(real, synthetic):
    likeness = Likeness()
    for side, images in zip(likeness._sides, (real, synthetic), strict=True):
        side.add(images)
    return likeness.differences()


def normalised(images):
    return (images - 0.305) / 0.376


UNLIKE = {
    "inverted": lambda images: 1 - images,
    "flat": lambda images: images.mean((2, 3), keepdim=True).expand_as(images),
    "of one shade each": lambda images: torch.rand(len(images), 1, 1, 1).expand_as(images),
    "faint": lambda images: images * 0.4,
    "dark": lambda images: images * 0.05,
}


@pytest.mark.parametrize("change", UNLIKE)
def test_images_that_do_not_look_like_the_real_ones_are_noticed(digits, change):
    assert differences(digits[:ENOUGH], UNLIKE[change](digits[ENOUGH : 2 * ENOUGH]))


def test_a_normalisation_applied_twice_or_not_at_all_is_noticed(digits):
    real, synthetic = digits[:ENOUGH], digits[ENOUGH : 2 * ENOUGH]
    assert differences(normalised(real), normalised(normalised(synthetic)))
    assert differences(normalised(real), synthetic)
    assert not differences(normalised(real), normalised(synthetic))


def test_chance_augmentation_and_other_classes_raise_no_alarm(digits):
    augment = v2.Compose([v2.RandomAffine(15, translate=(0.2, 0.2), scale=(0.85, 1.15)), v2.ColorJitter(0.2, 0.2)])
    torch.manual_seed(0)
    for _ in range(100):
        chosen = digits[torch.randperm(len(digits))[: 2 * ENOUGH]]
        assert not differences(chosen[:ENOUGH], augment(chosen[ENOUGH:]))
    for images in digits[:1500].split(500):  # by brightness: far more one-sided than classes are
        order = images.mean((1, 2, 3)).argsort()
        assert not differences(images[order[100:132]], images[order[300:332]])


class Inverted(FakeStream):
    def take(self, n):
        batch = super().take(n)
        batch.images[:] = 255 - batch.images
        return batch


def test_the_warning_comes_once_with_a_picture_of_both_rows(caplog, picture_folder):
    loader = StreamLoader(real_loader(), Inverted(), ratio=0.5)
    with caplog.at_level(logging.WARNING, logger="streamaug"):
        for _ in range(6):
            list(loader)
    (message,) = caplog.messages
    (file,) = picture_folder.iterdir()
    assert str(file) in message and "mean 0." in message and "real images above" in message
    assert "transform=, normalize=" in message
    picture = np.asarray(Image.open(file).convert("L")).astype(float)
    above, below = picture[: 8 * 12], picture[8 * 12 + 4 :]
    assert picture.shape == (2 * 8 * 12 + 4, 8 * (8 * 12 + 4)) and above.mean() + 50 < below.mean()


def test_it_needs_enough_images_and_speaks_for_rank_zero_alone(caplog, picture_folder):
    list(StreamLoader(real_loader(), Inverted(), ratio=0.5))  # 20 images
    other = StreamLoader(real_loader(), Inverted(rank=1), ratio=0.5)
    for _ in range(6):
        list(other)
    assert caplog.text == "" and not picture_folder.exists()


def test_the_picture_stands_beside_the_log(tmp_path, picture_folder):
    assert picture_folder_of(None) == picture_folder
    assert picture_folder_of(tmp_path / "run" / "train.log") == tmp_path / "run"


def picture_folder_of(log):
    if log is None:
        return likeness_module.picture_folder()
    log.parent.mkdir()
    handler = logging.FileHandler(log)
    logging.getLogger().addHandler(handler)
    try:
        return likeness_module.picture_folder()
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


def test_a_folder_that_cannot_be_written_costs_the_picture_only(caplog, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STREAMAUG_CACHE", str(tmp_path / "file"))
    loader = StreamLoader(real_loader(), Inverted(), ratio=0.5)
    list(loader), list(loader)
    assert "No picture could be written" in caplog.text


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 3), (3, 4, 8, 8)])
def test_images_without_channels_with_channels_last_and_clips_are_compared(shape, picture_folder):
    real = torch.rand(ENOUGH, *shape)
    assert Likeness().observe(real, torch.rand(ENOUGH, *shape)) and not picture_folder.exists()
    assert Likeness().observe(real, torch.rand(ENOUGH, *shape) * 0.1) and len(list(picture_folder.iterdir())) == 1

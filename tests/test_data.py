"""Data sources: what is read, in which order, how it is split, and what each refusal says."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from streamaug.config import DataConfig
from streamaug.data import ImageDataset, ImageSet, load_splits
from streamaug.data.decode import Unreadable, read_image
from streamaug.errors import DataError, MissingExtra

RED, BLUE = (220, 30, 20), (20, 40, 230)


def noise(seed: int, size: tuple[int, int] = (12, 12), mode: str = "RGB") -> Image.Image:
    """A picture of coarse random blocks: no two seeds agree."""
    rng = np.random.default_rng(seed)
    shape = (4, 4, 3) if mode == "RGB" else (4, 4)
    return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).resize(size, Image.Resampling.NEAREST)


def make_folder(root: Path, counts: dict[str, int], start: int = 0) -> Path:
    for number, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            noise(start + 1000 * number + i).save(root / name / f"{i:03d}.png")
    return root


def folder_config(root: Path, **changes) -> DataConfig:
    values = {"holdout": 0.25, "validation": 0, "image_size": 8, "channels": 3} | changes
    return DataConfig(source="folder", root=root, **values)


# ---- digits


@pytest.fixture(scope="module")
def digits():
    return load_splits(DataConfig())


def test_digits_are_divided_1000_297_500_with_nothing_in_common(digits):
    assert (len(digits.train), len(digits.validation), len(digits.test)) == (1000, 297, 500)
    sources = [source for part in (digits.train, digits.validation, digits.test) for source in part.sources]
    assert len(set(sources)) == 1797
    hashes = [set(part.hashes) for part in (digits.train, digits.validation, digits.test)]
    assert not hashes[0] & hashes[1] and not hashes[0] & hashes[2] and not hashes[1] & hashes[2]
    assert digits.notes == []


def test_digits_are_proportionally_divided_and_scaled_to_the_full_range(digits):
    assert all(set(part.labels) == set(range(10)) for part in (digits.train, digits.validation, digits.test))
    assert digits.test.class_counts().min() >= 47
    assert digits.train.images.dtype == np.uint8 and digits.train.images.shape == (1000, 1, 8, 8)
    assert set(np.unique(digits.train.images)) == {round(v * 255 / 16) for v in range(17)}


def test_unlabelled_is_train_and_validation_and_nothing_of_the_test(digits):
    both = digits.unlabelled
    assert len(both) == 1297
    assert set(both.sources) == set(digits.train.sources) | set(digits.validation.sources)
    assert not set(both.hashes) & set(digits.test.hashes)


def test_the_split_does_not_depend_on_image_size_or_channels(digits):
    other = load_splits(DataConfig(image_size=16, channels=3))
    assert other.test.sources == digits.test.sources
    assert other.train.image_shape == (3, 16, 16)
    assert (other.train.images[:, 0] == other.train.images[:, 2]).all()


def test_another_split_seed_holds_out_other_images(digits):
    assert load_splits(DataConfig(), seed=1).test.sources != digits.test.sources


def test_data_without_torch(digits):
    code = (
        "import sys; from streamaug.data import load_splits; from streamaug.config import DataConfig;"
        "load_splits(DataConfig()); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_missing_scikit_learn_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtra, match=r"scikit-learn.*streamaug\[demo\]"):
        load_splits(DataConfig())


# ---- drawing labelled images


def test_shots_are_exact_reproducible_and_nested(digits):
    three = digits.train.select_shots(3, seed=7)
    assert np.bincount(digits.train.labels[three]).tolist() == [3] * 10
    assert (three == digits.train.select_shots(3, seed=7)).all()
    assert not np.array_equal(three, digits.train.select_shots(3, seed=8))
    assert set(digits.train.select_shots(1, seed=7)) < set(three)
    assert not np.array_equal(digits.train.select_shots(3, seed=-1), digits.train.select_shots(3, seed=-2))
    assert digits.train.select_shots(None, seed=7).tolist() == list(range(1000))


def test_too_few_images_for_the_shots_names_the_class_and_its_count():
    images = ImageSet.from_arrays(np.zeros((3, 1, 2, 2), np.uint8), [0, 0, 1], ["cat", "dog"])
    with pytest.raises(DataError, match=r"class 'dog' has 1 images.*asks for 2.*at most 1"):
        images.select_shots(2, seed=0)


def test_a_label_outside_the_classes_is_refused_by_name():
    with pytest.raises(DataError, match=r"image/1: label 2 is outside the 2 classes"):
        ImageSet.from_arrays(np.zeros((2, 1, 2, 2), np.uint8), [0, 2], ["cat", "dog"])


@pytest.mark.parametrize("bad", [np.zeros((2, 1, 2, 2), np.float32), np.zeros((2, 2, 2), np.uint8)])
def test_images_of_another_type_or_shape_are_refused(bad):
    with pytest.raises(DataError, match=r"expected uint8 \[N, C, H, W\]"):
        ImageSet.from_arrays(bad, [0, 0], ["cat"])


def test_the_torch_data_set_yields_floats_and_survives_pickling(digits):
    data = pickle.loads(pickle.dumps(ImageDataset(digits.train)))
    image, label = data[5]
    assert len(data) == 1000 and data.transform is None and data.classes == digits.train.class_names
    assert image.shape == (1, 8, 8) and str(image.dtype) == "torch.float32"
    assert np.array_equal((image * 255).round().numpy(), digits.train.images[5]) and 0 <= image.min() <= 1
    assert type(label) is int and label == digits.train.labels[5]


# ---- folders


def test_a_folder_is_read_in_sorted_order_with_a_class_per_folder(tmp_path):
    make_folder(tmp_path / "data", {"dog": 4, "cat": 6})
    (tmp_path / "data" / ".cache").mkdir()
    (tmp_path / "data" / "cat" / ".hidden.png").write_bytes(b"")
    (tmp_path / "data" / "cat" / "notes.txt").write_text("not an image")
    train = load_splits(folder_config(tmp_path / "data", holdout=0)).train
    assert train.class_names == ["cat", "dog"]
    assert [Path(source).name for source in train.sources[:6]] == [f"{i:03d}.png" for i in range(6)]
    assert train.labels.tolist() == [0] * 6 + [1] * 4
    assert train.image_shape == (3, 8, 8)


def test_links_capital_suffixes_and_paths_with_dots_are_followed(tmp_path):
    make_folder(tmp_path / "real", {"a": 2, "b": 2})
    (tmp_path / "data" / "b").mkdir(parents=True)
    noise(1).save(tmp_path / "data" / "b" / "X.JPEG")
    (tmp_path / "data" / "b" / "linked.png").symlink_to(tmp_path / "real" / "b" / "000.png")
    (tmp_path / "data" / "a").symlink_to(tmp_path / "real" / "a")
    train = load_splits(folder_config(tmp_path / "real" / ".." / "data", holdout=0)).train
    assert train.labels.tolist() == [0, 0, 1, 1]


def test_where_the_folder_lies_does_not_change_the_split(tmp_path):
    for name in ("here", "there"):
        make_folder(tmp_path / name, {"a": 9, "b": 9})
    here, there = (load_splits(folder_config(tmp_path / name)).test for name in ("here", "there"))
    assert [Path(source).parts[-2:] for source in here.sources] == [Path(s).parts[-2:] for s in there.sources]


def test_an_added_image_moves_at_most_one_image_of_its_class_into_or_out_of_the_test(tmp_path):
    root = make_folder(tmp_path / "data", {"a": 20, "b": 20})
    before = set(load_splits(folder_config(root)).test.sources)
    noise(99).save(root / "a" / "0000.png")
    after = set(load_splits(folder_config(root)).test.sources)
    assert len(before - after) <= 1


def test_a_test_folder_is_mapped_by_class_name(tmp_path):
    root = make_folder(tmp_path / "train", {"a": 3, "b": 3, "c": 3})
    held = make_folder(tmp_path / "test", {"c": 1, "a": 2, "b": 1}, start=50_000)
    splits = load_splits(folder_config(root, test_root=held))
    assert splits.test.labels.tolist() == [0, 0, 1, 2] and len(splits.train) == 9


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({"a": 1, "b": 1, "bird": 1}, r"class 'bird' is not among data.root's.*a, b"),
        ({"a": 1}, r"no folder for class 'b'.*a, b"),
    ],
)
def test_a_test_folder_with_other_classes_is_refused_by_name(tmp_path, classes, message):
    root = make_folder(tmp_path / "train", {"a": 3, "b": 3})
    held = make_folder(tmp_path / "test", classes, start=50_000)
    with pytest.raises(DataError, match=message):
        load_splits(folder_config(root, test_root=held))


def test_pixels_of_a_test_image_never_stay_in_train_or_validation(tmp_path):
    root = make_folder(tmp_path / "train", {"a": 8, "b": 8})
    held = make_folder(tmp_path / "test", {"a": 2, "b": 2}, start=50_000)
    (held / "a" / "copy.png").write_bytes((root / "a" / "003.png").read_bytes())
    noise(1002).save(held / "b" / "copy.bmp")  # the pixels of b/002.png in another format
    (root / "b" / "twin.png").write_bytes((root / "b" / "007.png").read_bytes())
    (root / "a" / "wrong.png").write_bytes((root / "b" / "007.png").read_bytes())
    splits = load_splits(folder_config(root, test_root=held))
    assert len(splits.train) == 16
    assert not set(splits.train.hashes) & set(splits.test.hashes)
    assert splits.notes == [
        "2 train images dropped: the same pixels as a test image",
        "2 train images repeat the pixels of another train image (kept)",
        "1 train images have the pixels of an image of another class (kept)",
    ]


def test_a_test_folder_that_is_the_training_folder_is_refused(tmp_path):
    root = make_folder(tmp_path / "train", {"a": 3, "b": 3})
    with pytest.raises(DataError, match=r"every train image of class 'a' has the same pixels as a test image"):
        load_splits(folder_config(root, test_root=root))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"holdout": 500}, r"data.holdout: 500 means 500 of 12 images.*2 to 10"),
        ({"holdout": 0.05}, r"data.holdout: 0.05 means 1 of 12 images"),
        ({"holdout": 2.5}, r"2.5 is neither a count nor a fraction"),
        ({"holdout": 0, "validation": 297}, r"data.validation: 297 means 297 of 12"),
    ],
)
def test_a_share_that_leaves_a_class_empty_is_refused_with_what_fits(tmp_path, changes, message):
    root = make_folder(tmp_path / "data", {"a": 6, "b": 6})
    with pytest.raises(DataError, match=message):
        load_splits(folder_config(root, **changes))


def test_a_class_of_one_image_cannot_be_divided(tmp_path):
    root = make_folder(tmp_path / "data", {"a": 6, "b": 1})
    with pytest.raises(DataError, match=r"class 'b' has too few images"):
        load_splits(folder_config(root))


@settings(deadline=None, max_examples=60)
@given(
    counts=st.lists(st.integers(2, 30), min_size=1, max_size=6),
    share=st.floats(0.01, 0.99),
    seed=st.integers(-5, 5),
    data=st.data(),
)
def test_every_division_is_disjoint_complete_and_has_every_class_on_both_sides(counts, share, seed, data):
    from streamaug.data.sources import _divide

    labels = np.repeat(np.arange(len(counts)), counts)
    images = ImageSet.from_arrays(
        np.zeros((len(labels), 1, 1, 1), np.uint8), labels, [f"c{i}" for i in range(len(counts))]
    )
    as_count = data.draw(st.booleans())
    wanted = round(share * len(labels))
    amount = wanted if as_count else share
    if not len(counts) <= wanted <= len(labels) - len(counts):
        if wanted or not as_count:
            with pytest.raises(DataError):
                _divide(images, amount, "holdout", seed)
        return
    held, rest = _divide(images, amount, "holdout", seed)
    assert sorted(held.sources + rest.sources) == sorted(images.sources)
    assert len(held) == wanted and held.class_counts().min() >= 1 and rest.class_counts().min() >= 1


# ---- folders that cannot be used


def test_a_misspelt_folder_names_the_nearest(tmp_path):
    make_folder(tmp_path / "photos", {"a": 1})
    with pytest.raises(DataError, match=r"fotos: no such folder \(did you mean 'photos'\?\).*root/cat/001.png"):
        load_splits(folder_config(tmp_path / "fotos"))


def test_a_file_an_empty_folder_and_a_flat_folder_say_the_layout(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "flat").mkdir()
    noise(0).save(tmp_path / "flat" / "one.png")
    for name, found in (("file", "a file"), ("empty", "is empty"), ("flat", "holds one.png and no folder")):
        with pytest.raises(DataError, match=rf"{name}: {found}; expected one folder of images per class"):
            load_splits(folder_config(tmp_path / name))


def test_a_class_without_images_is_named_with_what_was_found(tmp_path):
    make_folder(tmp_path / "data", {"a": 2})
    (tmp_path / "data" / "b" / "nested").mkdir(parents=True)
    with pytest.raises(DataError, match=r"class 'b' has no image \(found nested\).*\.png"):
        load_splits(folder_config(tmp_path / "data"))


def test_bad_files_are_skipped_and_listed_up_to_the_limit_then_refused_with_reasons(tmp_path):
    root = make_folder(tmp_path / "data", {"a": 4, "b": 4})
    whole = (root / "a" / "000.png").read_bytes()
    (root / "a" / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (root / "a" / "empty.jpg").write_bytes(b"")
    (root / "b" / "text.png").write_text("no image")
    (root / "b" / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(root / "b" / "pipe.png")
    splits = load_splits(folder_config(root, holdout=0, max_bad=5))
    assert len(splits.train) == 8
    assert [note.split(":")[0].split("/")[-1] for note in splits.notes] == [
        "empty.jpg",
        "truncated.png",
        "dangling.png",
        "pipe.png",
        "text.png",
    ]
    with pytest.raises(DataError) as error:
        load_splits(folder_config(root, holdout=0, max_bad=3))
    message = str(error.value)
    assert "more than data.max_bad = 3" in message and "pipe.png: not a regular file" in message
    assert "empty.jpg: not an image" in message and "dangling.png: no such file" in message


def test_a_class_whose_files_are_all_bad_is_refused_with_the_list(tmp_path):
    root = make_folder(tmp_path / "data", {"a": 2})
    (root / "b").mkdir()
    (root / "b" / "text.png").write_text("no image")
    with pytest.raises(DataError, match=r"no readable image of class 'b':\n.*text.png: not an image"):
        load_splits(folder_config(root))


# ---- one file


def read(image: Image.Image, path: Path, channels: int = 3, size: int = 8, fit="stretch", **save) -> np.ndarray:
    image.save(path, **save)
    return read_image(path, size, channels, fit)


def solid(mode: str, colour, size=(16, 16)) -> Image.Image:
    return Image.new(mode, size, colour)


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff"])
def test_every_accepted_format_gives_the_colour_that_was_saved(tmp_path, suffix):
    pixels = read(solid("RGB", RED), tmp_path / f"x.{suffix}")
    assert pixels.shape == (3, 8, 8) and pixels.dtype == np.uint8
    assert np.abs(pixels[:, 4, 4].astype(int) - RED).max() <= 4


def test_an_image_turned_by_exif_is_turned_back(tmp_path):
    upright = Image.new("RGB", (8, 16), RED)
    upright.paste(BLUE, (0, 8, 8, 16))  # blue below
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90° clockwise
    pixels = read(upright.rotate(90, expand=True), tmp_path / "x.png", fit="stretch", exif=exif)
    assert pixels[0, 1, 4] > 200 and pixels[2, 6, 4] > 200


@pytest.mark.parametrize(
    ("image", "save"),
    [
        (solid("RGBA", (*RED, 0)), {}),
        (solid("LA", (0, 0)), {}),
        (solid("P", 0), {"transparency": 0}),
        (solid("RGB", RED), {"transparency": RED}),
        (solid("L", 7), {"transparency": 7}),
    ],
)
def test_transparency_is_laid_over_white(tmp_path, image, save):
    assert (read(image, tmp_path / "x.png", **save) == 255).all()


def test_half_transparent_black_becomes_grey(tmp_path):
    assert np.abs(read(solid("RGBA", (0, 0, 0, 128)), tmp_path / "x.png").astype(int) - 127).max() <= 1


def test_palette_bilevel_and_cmyk_images_keep_their_colours(tmp_path):
    palette = solid("RGB", BLUE).convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.abs(read(palette, tmp_path / "p.png")[:, 0, 0].astype(int) - BLUE).max() <= 2
    assert (read(solid("1", 1), tmp_path / "1.png") == 255).all()
    cmyk = read(solid("CMYK", (0, 255, 255, 0)), tmp_path / "c.jpg")
    assert cmyk[0].min() > 200 and cmyk[1:].max() < 60


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_are_scaled_to_8(tmp_path, suffix):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    pixels = read(Image.fromarray(ramp), tmp_path / f"x.{suffix}", channels=1)
    assert np.array_equal(pixels[0], np.round(ramp / 257).astype(np.uint8))


def test_float_images_in_0_to_1_are_read_and_others_refused_with_their_range(tmp_path):
    unit = Image.fromarray(np.full((8, 8), 0.5, np.float32))
    assert (read(unit, tmp_path / "unit.tif", channels=1) == 128).all()
    Image.fromarray(np.full((8, 8), 700.0, np.float32)).save(tmp_path / "wide.tif")
    with pytest.raises(Unreadable, match=r"from 700 to 700 in mode F; accepted"):
        read_image(tmp_path / "wide.tif", 8, 1, "crop")


def test_colour_becomes_luminance_and_grey_three_equal_channels(tmp_path):
    grey = read(solid("RGB", (255, 0, 0)), tmp_path / "red.png", channels=1)
    assert grey.shape == (1, 8, 8) and (grey == 76).all()
    assert (read(solid("L", 90), tmp_path / "grey.png", channels=3) == 90).all()


def test_the_first_frame_of_an_animation_is_read(tmp_path):
    frames = [solid("RGB", RED), solid("RGB", BLUE)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "x.gif", 8, 3, "crop")[0].min() > 200


def test_crop_keeps_the_centre_letterbox_adds_bars_stretch_changes_the_aspect(tmp_path):
    wide = Image.new("RGB", (32, 8), BLUE)
    wide.paste(RED, (12, 0, 20, 8))
    wide.save(tmp_path / "wide.png")
    crop = read_image(tmp_path / "wide.png", 8, 3, "crop")
    assert (crop[0] == RED[0]).all() and (crop[2] == RED[2]).all()
    letterbox = read_image(tmp_path / "wide.png", 32, 3, "letterbox")
    assert (letterbox[:, :12] == 0).all() and (letterbox[:, 20:] == 0).all()
    assert letterbox[2, 16, 2] == BLUE[2] and letterbox[0, 16, 16] == RED[0]
    stretch = read_image(tmp_path / "wide.png", 8, 3, "stretch")
    assert stretch[2, 4, 0] > 200 and stretch[0, 4, 4] > 180


@pytest.mark.parametrize("fit", ["crop", "letterbox", "stretch"])
@pytest.mark.parametrize("size", [(1, 1), (900, 1), (1, 900), (8, 8)])
def test_any_aspect_gives_the_wanted_shape(tmp_path, fit, size):
    assert read(noise(3, size), tmp_path / "x.png", size=8, fit=fit).shape == (3, 8, 8)


def test_an_image_of_the_wanted_size_is_left_as_it_is(tmp_path):
    image = noise(5, (8, 8))
    assert np.array_equal(read(image, tmp_path / "x.png", fit="crop"), np.asarray(image).transpose(2, 0, 1))


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_shrinking_does_not_alias(tmp_path, suffix):
    board = np.indices((512, 512)).sum(0) % 2 * 255  # a one-pixel chessboard: an aliased reduction is not grey
    image = Image.fromarray(board.astype(np.uint8))
    pixels = read(image, tmp_path / f"x.{suffix}", channels=1, size=16, fit="crop")
    assert np.abs(pixels.astype(int) - 127).max() <= 3

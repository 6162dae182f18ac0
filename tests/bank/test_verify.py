"""Verifying: every damaged byte is named, repair drops its rows alone, and an inverted validation image is found."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from streamaug.bank import LatentBank
from streamaug.bank.verify import compare, repair, verify
from streamaug.data import ImageSet
from streamaug.data.perceptual import perceptual_hash
from streamaug.errors import BankError, DataError

from .banks import ROWS, contents, make_nan, make_plan, shard_of, write
from .test_edit import same_rows


def test_an_undamaged_bank_has_no_problems(expected):
    found = verify(expected[2].path)
    assert found.problems == [] and not found.damaged.any() and found.names == []


def test_changed_files_and_rows_that_are_not_finite_are_named(expected, copy):
    make_nan(shard_of(copy, 1), "latent", 2, 2 * 3 * 3 * 2)  # row 2 of the shard is row 8 of the bank
    found = verify(copy)
    assert len(found.problems) == 2
    assert "encode-00001" in found.problems[0] and "its bytes are not those that were written" in found.problems[0]
    assert "(rows 6 to 11, part 'encode')" in found.problems[0]
    assert found.problems[1] == "row 8 (images/8.png): 'latent' is not finite"
    assert np.flatnonzero(found.damaged).tolist() == [6, 7, 8, 9, 10, 11]
    shard_of(copy, 1).unlink()
    write(copy, expected[0])
    assert contents(copy) == expected[1]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda file: os.truncate(file, 200), r"200 bytes of"),
        (lambda file: file.unlink(), "missing"),
        (lambda file: file.write_bytes(b"\xff" * file.stat().st_size), "its bytes are not those"),
    ],
)
def test_repair_drops_the_rows_of_a_damaged_shard_and_lists_them(expected, copy, damage, said):
    damage(shard_of(copy, 1, "embedding"))
    found = repair(copy)
    assert len(found.problems) == 1 and said in found.problems[0] and "embedding-00001" in found.problems[0]
    assert found.names == [f"images/{row}.png" for row in range(5, 10)]
    bank = LatentBank.open(copy)
    same_rows(bank, [*range(5), *range(10, ROWS)], expected[2])
    assert bank.edits == ["5 of 23 rows dropped by repair"] and verify(copy).problems == []


def test_repair_of_an_undamaged_bank_changes_nothing(expected, copy):
    repair(copy)
    assert contents(copy) == expected[1]


def test_a_bank_without_a_sound_row_is_not_repaired(copy):
    for file in copy.glob("encode-*"):
        os.truncate(file, 10)
    with pytest.raises(BankError, match=r"no row would be left; run `streamaug invert` again: what is sound is kept"):
        repair(copy)


def test_a_damaged_rows_file_is_said_to_need_inversion(expected, copy):
    rows = next(copy.glob("rows-*"))
    rows.write_bytes(rows.read_bytes()[:-1] + b"?")
    with pytest.raises(BankError, match=r"rows-\w+.safetensors: its bytes.*run `streamaug invert` again"):
        repair(copy)
    computed: list[str] = []
    write(copy, expected[0], computed)
    assert computed == [] and contents(copy) == expected[1]


# ---- against a folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> tuple[np.ndarray, LatentBank]:
    """40 textured pictures, uint8 [40, 3, 32, 32], of which the first 23 are a bank's sources."""
    rng = np.random.default_rng(0)
    frequencies = np.hypot(np.fft.fftfreq(32)[:, None], np.fft.fftfreq(32)[None])
    frequencies[0, 0] = 1
    waves = np.fft.ifft2(np.fft.fft2(rng.normal(size=(40, 3, 32, 32))) / frequencies).real
    images = np.clip(waves / waves.std() * 50 + 128, 0, 255).astype(np.uint8)
    sources = ImageSet.from_arrays(images[:ROWS], np.arange(ROWS) % 3, ["cat", "dog", "emu"])
    plan = make_plan(
        source_hashes=sources.hashes,
        meta={"model": "m1", "image_shape": [3, 32, 32]},
        perceptual_hashes=perceptual_hash(sources.images),
    )
    return images, write(tmp_path_factory.mktemp("pictures") / "bank", plan)


def save(file: Path, image: np.ndarray, size: int = 32, **options) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.transpose(1, 2, 0)).resize((size, size), Image.Resampling.BICUBIC).save(file, **options)


def test_other_images_are_not_taken_for_leaks(pictures, tmp_path):
    images, bank = pictures
    for number, image in enumerate(images[ROWS:]):
        save(tmp_path / "cat" / f"{number}.png", image)
    found = compare(bank, tmp_path)
    assert found.images == 40 - ROWS and found.leaks == [] and found.perceptual and found.unreadable == []


def test_the_same_pixels_and_near_duplicates_are_found_at_any_depth(pictures, tmp_path):
    images, bank = pictures
    save(tmp_path / "same.png", images[3])
    save(tmp_path / "a" / "jpeg.jpg", images[4], size=64, quality=85)
    save(tmp_path / "a" / "b" / "small.webp", images[5], size=24, lossless=True)
    save(tmp_path / "other.png", images[30])
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "broken.png").write_text("no image")
    found = compare(bank, tmp_path)
    assert [(leak.file.name, leak.row, leak.name) for leak in found.leaks] == [
        ("small.webp", 5, "images/5.png"),
        ("jpeg.jpg", 4, "images/4.png"),
        ("same.png", 3, "images/3.png"),
    ]
    bits = [leak.bits for leak in found.leaks]
    assert bits[2] is None and 0 <= bits[0] <= 11 and 0 <= bits[1] <= 11
    assert found.images == 4 and len(found.unreadable) == 1 and "broken.png: not an image" in found.unreadable[0]


def test_the_distance_is_what_is_asked_for(pictures, tmp_path):
    images, bank = pictures
    save(tmp_path / "other.png", images[30])
    assert compare(bank, tmp_path, distance=0).leaks == []
    assert len(compare(bank, tmp_path, distance=256).leaks) == ROWS


def test_a_folder_is_read_as_the_banks_images_were(pictures, tmp_path):
    images, bank = pictures
    wide = np.zeros((3, 32, 64), np.uint8)
    wide[:, :, 16:48] = images[7]
    save_wide = Image.fromarray(wide.transpose(1, 2, 0))
    save_wide.save(tmp_path / "wide.png")
    assert [leak.row for leak in compare(bank, tmp_path).leaks] == [7]
    assert compare(bank, tmp_path, fit="stretch").leaks == []


def test_without_perceptual_hashes_the_same_pixels_are_found_and_it_is_said(pictures, tmp_path):
    images, _ = pictures
    hashes = ImageSet.from_arrays(images[:ROWS], np.zeros(ROWS, np.int64), ["a"]).hashes
    plan = make_plan(source_hashes=hashes, meta={"model": "m1", "image_shape": [3, 32, 32]})
    bank = write(tmp_path / "bank", plan)
    save(tmp_path / "images" / "same.png", images[3])
    save(tmp_path / "images" / "jpeg.jpg", images[4])
    found = compare(bank, tmp_path / "images")
    assert [leak.row for leak in found.leaks] == [3] and not found.perceptual


@pytest.mark.parametrize("files", [[], ["notes.txt"], ["broken.png"], [".hidden.png"]])
def test_a_folder_without_a_readable_image_is_an_error_and_no_pass(pictures, tmp_path, files):
    for name in files:
        (tmp_path / name).write_text("no image")
    with pytest.raises(DataError, match=r"no readable image in it or below; nothing was compared"):
        compare(pictures[1], tmp_path)


def test_a_missing_folder_is_an_error(pictures, tmp_path):
    with pytest.raises(DataError, match=r"nowhere: no such folder"):
        compare(pictures[1], tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match=r"file: a file; expected a folder of images"):
        compare(pictures[1], tmp_path / "file")


def test_images_that_are_not_square_are_not_compared(tmp_path):
    bank = write(tmp_path / "bank", make_plan(meta={"model": "m1", "image_shape": [1, 2, 8]}))
    with pytest.raises(BankError, match=r"2 × 8; only square"):
        compare(bank, tmp_path)

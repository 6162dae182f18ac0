"""Inversion as a job: nothing is computed twice, only what a change affects is redone, an estimate writes nothing."""

import hashlib
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from streamaug.bank import Checkpoint, LatentBank, Part
from streamaug.data import ImageSet
from streamaug.errors import BankError
from streamaug.inversion.run import Estimate, MethodEstimate, estimate, invert

ROWS, GROUP = 50, 16  # 4 groups, the last of 2 rows


class Counting:
    """A method that keeps the groups it was given. Its tensors depend on the images and on `setting`."""

    def __init__(self, name: str, setting: float = 0.0, model: str = "m", group_rows: int = GROUP):
        self.part = Part(name, {"setting": setting, "model": model}, group_rows, "float16")
        self.setting = setting
        self.groups: list[list[int]] = []

    def compute(
        self, images: np.ndarray, labels: np.ndarray, rows: np.ndarray, checkpoint: Checkpoint
    ) -> dict[str, torch.Tensor]:
        assert len(images) == len(labels) == len(rows) == self.part.group_rows
        self.groups.append(rows.tolist())
        latent = torch.from_numpy(images).float() + self.setting
        return {f"{self.part.name}_latent": latent, f"{self.part.name}.error": latent.mean((1, 2, 3))}


def images(count: int = ROWS) -> ImageSet:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 1, 4, 4), dtype=np.uint8)
    return ImageSet.from_arrays(pixels, np.arange(count) % 2, ["cat", "dog"])


def write(path: Path, methods: list, real: ImageSet | None = None, **settings) -> LatentBank:
    real = images() if real is None else real
    return invert(real, path, methods, **({"model_digest": "m", "shard_rows": 32} | settings))


def contents(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}


def test_a_bank_has_the_rows_of_every_method_and_where_they_came_from(tmp_path):
    real = images()
    bank = write(tmp_path / "bank", [Counting("encode"), Counting("ddim", 1.0, group_rows=20)])
    assert torch.equal(bank.tensor("encode_latent"), torch.from_numpy(real.images).half())
    assert torch.equal(bank.tensor("ddim_latent"), torch.from_numpy(real.images).half() + 1)
    np.testing.assert_allclose(bank.row_array("ddim.error"), real.images.mean((1, 2, 3)) + 1, rtol=1e-6)
    assert bank.labels.tolist() == real.labels.tolist() and bank.class_names == ["cat", "dog"]
    assert bank.source_hashes == real.hashes and bank.source_names == real.sources
    assert bank.image_shape == (1, 4, 4) and bank.meta["model"] == "m"
    assert bank.parts == {"encode": {"setting": 0.0, "model": "m"}, "ddim": {"setting": 1.0, "model": "m"}}
    assert bank.perceptual_hashes is not None and bank.perceptual_hashes.shape == (ROWS,)


def test_a_finished_bank_is_opened_without_computing_or_writing(tmp_path):
    first = write(tmp_path / "bank", [Counting("encode")])
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "bank").iterdir()}
    method, calls = Counting("encode"), []
    again = write(tmp_path / "bank", [method], progress=lambda *counts: calls.append(counts))
    assert again.digest == first.digest and method.groups == [] and calls == [("encode", ROWS, ROWS)]
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "bank").iterdir()} == before


def test_progress_counts_rows_of_each_method_and_an_interrupted_inversion_goes_on(tmp_path):
    calls: list[tuple[str, int, int]] = []

    def stop(method: str, done: int, total: int) -> None:
        calls.append((method, done, total))
        if (method, done) == ("ddim", GROUP):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "bank", [Counting("encode"), Counting("ddim")], progress=stop)
    encoded = [("encode", done, ROWS) for done in (0, 16, 32, 48, 50)]
    assert calls == [*encoded, ("ddim", 0, ROWS), ("ddim", 16, ROWS)]
    methods, rest = [Counting("encode"), Counting("ddim")], []
    write(tmp_path / "bank", methods, progress=lambda method, done, total: rest.append((method, done)))
    assert rest == [("encode", 50), *(("ddim", done) for done in (16, 32, 48, 50))] and [
        len(method.groups) for method in methods
    ] == [0, 3]
    write(tmp_path / "whole", [Counting("encode"), Counting("ddim")])
    assert contents(tmp_path / "bank") == contents(tmp_path / "whole")


def changed_image() -> ImageSet:
    real = images()
    pixels = real.images.copy()
    pixels[20] = 255 - pixels[20]
    return ImageSet.from_arrays(pixels, real.labels, real.class_names)


@pytest.mark.parametrize(
    ("real", "methods", "groups"),
    [
        (changed_image(), [Counting("encode"), Counting("ddim")], [1, 1]),
        (images(), [Counting("encode"), Counting("ddim", 1.0)], [0, 4]),
        (images(), [Counting("encode", model="m2"), Counting("ddim", model="m2")], [4, 4]),
        (images(), [Counting("ddim"), Counting("encode"), Counting("embedding")], [0, 0, 4]),
        (images(34), [Counting("encode"), Counting("ddim")], [1, 1]),
    ],
    ids=["an image", "a setting of ddim", "the model", "one more method", "images taken away"],
)
def test_a_change_redoes_only_what_it_affects(tmp_path, real, methods, groups):
    write(tmp_path / "bank", [Counting("encode"), Counting("ddim")])
    for method in methods:
        method.groups.clear()
    bank = write(tmp_path / "bank", methods, real)
    assert [len(method.groups) for method in methods] == groups
    write(tmp_path / "fresh", methods, real)
    assert contents(tmp_path / "bank") == contents(tmp_path / "fresh")
    assert torch.equal(bank.tensor("encode_latent"), torch.from_numpy(real.images).half())


def test_images_that_are_there_twice_are_counted_in_the_log(tmp_path, caplog):
    real = images().subset([0, 1, 2, 1, 1, 0])
    with caplog.at_level(logging.WARNING, "streamaug"):
        write(tmp_path / "bank", [Counting("encode")], real)
        write(tmp_path / "bank", [Counting("encode")], real)
    assert [record.getMessage() for record in caplog.records] == [
        "3 of 6 images are the same, pixel for pixel, as another; each has a row"
    ]


@pytest.mark.parametrize("job", [invert, estimate])
def test_without_images_only_a_bank_without_methods_is_made(tmp_path, job):
    nothing = images().subset([])
    arguments = {"model_digest": "m", "shard_rows": 32}
    with pytest.raises(BankError, match=r"no images to put into the bank; .* bank\.methods to \[prompt\]"):
        job(nothing, tmp_path / "bank", [Counting("encode")], **arguments)
    assert not (tmp_path / "bank").exists()
    bank = invert(nothing, tmp_path / "bank", [], **arguments)
    assert bank.num_rows == 0 and bank.parts == {} and bank.class_names == ["cat", "dog"]
    assert estimate(nothing, tmp_path / "bank", [], **arguments).seconds == 0


def test_an_estimate_knows_what_is_done_and_writes_nothing(tmp_path):
    def stop(method: str, done: int, total: int) -> None:
        if done == 32:
            raise KeyboardInterrupt

    path = tmp_path / "bank"
    with pytest.raises(KeyboardInterrupt):
        write(path, [Counting("encode"), Counting("ddim")], progress=stop)
    before = contents(tmp_path), {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    method = Counting("encode")
    found = estimate(images(), path, [method, Counting("ddim")], model_digest="m", shard_rows=32)
    assert (contents(tmp_path), {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}) == before
    assert [(each.name, each.rows, each.done_rows) for each in found.methods] == [("encode", 50, 32), ("ddim", 50, 0)]
    assert [each.computed_rows for each in found.methods] == [32, 64], "the last group is filled up"
    assert set(map(tuple, method.groups)) == {tuple(range(32, 48))}, "it measures a group that is still to be done"
    assert found.seconds > 0


def test_an_estimate_counts_of_other_banks_what_an_inversion_takes_over(tmp_path):
    def stop(method: str, done: int, total: int) -> None:
        if done == 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "unfinished", [Counting("ddim")], progress=stop)
    write(tmp_path / "finished", [Counting("encode")])
    others = [tmp_path / "finished", tmp_path / "unfinished"]
    methods = [Counting("encode"), Counting("ddim")]
    found = estimate(images(), tmp_path / "bank", methods, model_digest="m", shard_rows=32, others=others)
    again = [Counting("encode"), Counting("ddim")]
    write(tmp_path / "bank", again, others=others)
    assert [each.computed_rows for each in found.methods] == [GROUP * len(method.groups) for method in again] == [0, 64]


def test_a_bank_to_copy_from_that_goes_meanwhile_is_one_message_and_its_rows_are_computed(tmp_path):
    other = write(tmp_path / "other", [Counting("encode")]).path
    methods, expected = [Counting("encode"), Counting("ddim")], contents(other)

    def remove(method: str, done: int, total: int) -> None:
        for file in other.glob("encode-*"):
            file.unlink()

    with pytest.raises(BankError, match=r"which has changed meanwhile .* start again"):
        write(tmp_path / "bank", methods, others=[other], progress=remove)
    assert [len(method.groups) for method in methods] == [0, 1], "it is said at the first group that is put"
    write(tmp_path / "bank", methods, others=[other])
    assert [len(method.groups) for method in methods] == [4, 1 + 4]
    there = contents(tmp_path / "bank")
    assert {name: there[name] for name in expected if name.startswith("encode")} == {
        name: data for name, data in expected.items() if name.startswith("encode")
    }


def test_the_estimated_bytes_are_those_of_the_bank_but_for_headers(tmp_path):
    methods = [Counting("encode"), Counting("ddim")]
    found = estimate(images(), tmp_path / "bank", methods, model_digest="m", shard_rows=4096)
    assert not (tmp_path / "bank").exists()
    write(tmp_path / "bank", methods, shard_rows=4096)
    files = sorted((tmp_path / "bank").glob("*.safetensors"))
    assert len(files) == 3
    headers = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in files)
    assert found.bytes == sum(file.stat().st_size for file in files) - headers


def test_an_estimate_reads_as_time_and_disk_by_method_and_in_all():
    encode = MethodEstimate("encode", 12000, 2000, 10000, 0.002, 1.0, 3_000_000)
    ddim = MethodEstimate("ddim", 12000, 12000, 0, 0.5, 1.0, 2_500_000_000)
    assert str(Estimate(Path("b"), [encode, ddim], 500_000)).splitlines() == [
        "encode: 12,000 images, 2,000 of them done; 2 ms an image, 21 s to go; 3 MB on disk",
        "ddim: 12,000 images, 12,000 of them done; 500 ms an image, 0 s to go; 2.5 GB on disk",
        "in all: 21 s to go, 2.5 GB at b",
    ]


def test_a_method_that_takes_long_measures_itself(tmp_path):
    class Long(Counting):
        def rehearse(self, images, labels, rows):
            return 18.0, {"tokens": torch.zeros(2, 5, 8)}

    method = Long("embedding", group_rows=100)
    found = estimate(images(), tmp_path / "bank", [method], model_digest="m", shard_rows=32).methods[0]
    assert method.groups == [] and found.seconds == 18.0 * ROWS and found.bytes == ROWS * 5 * 8 * 2


def test_a_bank_is_the_same_whatever_the_global_generator_holds(tmp_path):
    digests = []
    for name in ("a", "b"):
        torch.manual_seed(len(digests))
        data = contents(write(tmp_path / name, [Counting("encode")]).path)
        digests.append(hashlib.sha256(repr(sorted(data.items())).encode()).hexdigest())
    assert digests[0] == digests[1]


def test_a_bank_that_is_damaged_does_not_lose_the_methods_that_are_not_named(tmp_path):
    path = tmp_path / "bank"
    write(path, [Counting("encode"), Counting("embedding")])
    shard = next(path.glob("encode-*"))
    shard.write_bytes(shard.read_bytes()[:100])
    kept = {file.name for file in path.glob("embedding-*")}
    with pytest.raises(BankError, match="also holds embedding"):
        write(path, [Counting("encode")])
    assert {file.name for file in path.glob("embedding-*")} == kept
    again = Counting("embedding")
    write(path, [Counting("encode"), again])
    assert again.groups == []

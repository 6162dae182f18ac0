"""Inversion as a job: images and methods to a bank, resumably, and what that takes before it is begun."""

import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from streamaug.bank import BankPlan, BankWriter, Checkpoint, Group, LatentBank, open_if_current
from streamaug.bank.files import WORK, data_files, file_entries, groups_in, read_index
from streamaug.data import ImageSet
from streamaug.data.perceptual import perceptual_hash
from streamaug.errors import BankError
from streamaug.inversion.method import Method

_log = logging.getLogger("streamaug")

_WORTH_REPEATING = 10.0  # seconds; much of a shorter measurement is the reading of weights, so it is made twice


def invert(
    images: ImageSet,
    path: str | os.PathLike,
    methods: Sequence[Method],
    *,
    model_digest: str,
    shard_rows: int,
    fit: str = "crop",
    others: Sequence[Path] = (),
    progress: Callable[[str, int, int], None] | None = None,
) -> LatentBank:
    """Write the bank of `images` to the folder `path`, or open it when it is already there.

    Goes on where an interrupted run stopped, and redoes only what changed images, model or settings affect: a group of
    one method at least. A bank that is there and complete may hold other methods too; one that would lose a method by
    being written anew is refused. Without methods the bank has labels and source hashes alone, and may have no rows.
    Images that are there more than once are counted in the log. model_digest: identifies the model's weights. fit: how
    the images were brought to their size, for comparing them with others later. others: banks that may hold groups
    which this one needs too; those are copied. progress: called with (method, rows done, rows in all), first with what
    an earlier run left, then after every group. Raises BankError, and whatever a method does.
    """
    plan = _plan(images, path, methods, model_digest, shard_rows, fit)
    report = progress or (lambda method, done, total: None)
    bank = open_if_current(path, plan)
    if bank is not None:
        for method in methods:
            report(method.part.name, plan.num_rows, plan.num_rows)
        return bank
    _refuse_to_lose(Path(path), plan)
    _count_duplicates(images)
    with BankWriter(path, plan, others) as writer:
        for method in methods:
            name = method.part.name
            done = writer.done_rows(name)
            report(name, done, plan.num_rows)
            for group in writer.pending(name):
                size, before = len(group.rows), done
                checkpoint = writer.checkpoint(name, group)
                checkpoint.on_share = lambda share: report(name, before + int(share * size), plan.num_rows)  # noqa: B023
                writer.put(name, group, _compute(method, images, group, checkpoint))
                done += size
                report(name, done, plan.num_rows)
        return writer.finish()


@dataclass(frozen=True)
class MethodEstimate:
    """What one method takes.

    rows: in all; done_rows: those that an earlier run left; computed_rows: those to be computed, with the copies that
    fill the last group; seconds_per_image: measured on one group; start_seconds: until the first group runs, for
    reading weights; bytes: of the finished part.
    """

    name: str
    rows: int
    done_rows: int
    computed_rows: int
    seconds_per_image: float
    start_seconds: float
    bytes: int

    @property
    def seconds(self) -> float:
        """What is left to do."""
        return self.start_seconds + self.computed_rows * self.seconds_per_image if self.computed_rows else 0.0


@dataclass(frozen=True)
class Estimate:
    """What an inversion takes: time left and disk, by method and together; `str` is for people."""

    path: Path
    methods: list[MethodEstimate]
    row_bytes: int  # of labels, hashes and source names

    @property
    def seconds(self) -> float:
        return sum(method.seconds for method in self.methods)

    @property
    def bytes(self) -> int:
        return self.row_bytes + sum(method.bytes for method in self.methods)

    def __str__(self) -> str:
        lines = [
            f"{method.name}: {method.rows:,} images, {method.done_rows:,} of them done; "
            f"{_duration(method.seconds_per_image)} an image, {_duration(method.seconds)} to go; "
            f"{_size(method.bytes)} on disk"
            for method in self.methods
        ]
        free = shutil.disk_usage(
            next(each for each in (self.path, *self.path.absolute().parents) if each.exists())
        ).free
        short = f": only {_size(free)} are free there" if free < self.bytes else ""
        return "\n".join(
            [*lines, f"in all: {_duration(self.seconds)} to go, {_size(self.bytes)} at {self.path}{short}"]
        )


def estimate(
    images: ImageSet,
    path: str | os.PathLike,
    methods: Sequence[Method],
    *,
    model_digest: str,
    shard_rows: int,
    fit: str = "crop",
    others: Sequence[Path] = (),
) -> Estimate:
    """What `invert` with the same arguments takes, measured on one group of each method, whose result is thrown away.

    Nothing is written. Raises BankError, and whatever a method does.
    """
    plan = _plan(images, path, methods, model_digest, shard_rows, fit)
    stored = _stored_groups(Path(path)).union(*map(_finished_groups, others))
    found = []
    for method in methods:
        part = method.part
        groups, marks = plan.groups(part.name), plan.layout(part.name).fingerprints
        pending = [group for group in groups if marks[group.number] not in stored]
        measured = _measure(method, images, pending[0] if pending else groups[0])
        left = sum(len(group.rows) for group in pending)
        found.append(
            MethodEstimate(
                name=part.name,
                rows=plan.num_rows,
                done_rows=plan.num_rows - left,
                computed_rows=len(pending) * part.group_rows if measured.copies_cost else left,
                seconds_per_image=measured.seconds_per_image,
                start_seconds=measured.start_seconds,
                bytes=plan.num_rows * _row_bytes(measured.tensors, part.torch_dtype),
            )
        )
    return Estimate(Path(path), found, sum(tensor.nbytes for tensor in plan.row_tensors.values()))


def _plan(
    images: ImageSet, path: str | os.PathLike, methods: Sequence[Method], model_digest: str, shard_rows: int, fit: str
) -> BankPlan:
    if methods and len(images) == 0:
        raise BankError(
            f"{path}: no images to put into the bank; give data.root a folder with images, or set bank.methods to "
            "[prompt], which takes none"
        )
    return BankPlan(
        labels=images.labels,
        source_hashes=images.hashes,
        source_names=images.sources,
        class_names=images.class_names,
        meta={"model": model_digest, "image_shape": list(images.image_shape), "fit": fit},
        parts=[method.part for method in methods],
        shard_rows=shard_rows,
        perceptual_hashes=perceptual_hash(images.images),
    )


def _refuse_to_lose(path: Path, plan: BankPlan) -> None:
    """Raise BankError when the bank at `path` holds parts that the plan has not: writing it would delete them."""
    try:
        index = read_index(path)  # a bank with a damaged shard does not open, and its other parts are worth keeping
    except BankError:
        return
    lost = sorted({part["name"] for part in index["parts"]} - {part.name for part in plan.parts} - {"score"})
    if lost:
        raise BankError(
            f"{path}: this bank also holds {', '.join(lost)}, which bank.methods does not name, and is not current "
            "otherwise: writing it would delete them; name them too, or set bank.path to another folder"
        )


def _compute(method: Method, images: ImageSet, group: Group, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    rows = group.padded
    return method.compute(images.images[rows], images.labels[rows], rows, checkpoint)


@dataclass(frozen=True)
class _Measured:
    """One group of a method, computed. copies_cost: whether rows that fill up a group take as long as others."""

    tensors: dict[str, torch.Tensor]
    seconds_per_image: float
    start_seconds: float = 0.0
    copies_cost: bool = True


def _measure(method: Method, images: ImageSet, group: Group) -> _Measured:
    """A method whose groups take too long for that measures itself (`Embedding.rehearse`)."""
    rows = group.padded
    rehearse = getattr(method, "rehearse", None)
    if rehearse is not None:
        seconds_per_image, tensors = rehearse(images.images[rows], images.labels[rows], rows)
        return _Measured(tensors, seconds_per_image, copies_cost=False)
    began = time.perf_counter()
    tensors = _compute(method, images, group, Checkpoint(None))
    first = again = time.perf_counter() - began
    if first < _WORTH_REPEATING:
        began = time.perf_counter()
        _compute(method, images, group, Checkpoint(None))
        again = min(first, time.perf_counter() - began)
    return _Measured(tensors, again / len(rows), first - again)


def _count_duplicates(images: ImageSet) -> None:
    copies = len(images) - len(set(images.hashes))
    if copies:
        _log.warning("%d of %d images are the same, pixel for pixel, as another; each has a row", copies, len(images))


def _stored_groups(folder: Path) -> set[str]:
    """Fingerprints of the groups that a bank's folder holds, finished or not."""
    files = [*data_files(folder), *(folder / WORK).glob("*-group-*.safetensors")] if folder.is_dir() else []
    return {fingerprint for file in files for fingerprint, _ in groups_in(file)}


def _finished_groups(folder: Path) -> set[str]:
    """Fingerprints of the groups in the files that a bank's index names: those that another bank may take over."""
    try:
        entries = file_entries(read_index(folder))
    except BankError:
        return set()
    return {fingerprint for entry in entries for fingerprint, _ in groups_in(folder / entry["file"])}


def _row_bytes(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> int:
    """Bytes that one row takes in the bank."""
    return sum(
        value[0].numel() * (dtype.itemsize if value.is_floating_point() and value.ndim > 1 else value.element_size())
        for value in tensors.values()
    )


def _duration(seconds: float) -> str:
    if 0 < seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"

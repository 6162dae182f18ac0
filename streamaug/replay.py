"""Making delivered images again from a run's manifest: single ones by id, or the whole set on disk.

A batch is executed as the producer executed it, whole and with the same judge, engine options and threads, and what
comes out is compared with what the manifest says of it.
"""

import errno
import io
import json
import logging
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from streamaug.bank import LatentBank
from streamaug.errors import MismatchError, StreamaugError, UsageError, nearest
from streamaug.orders import REASONS, OrderBatch
from streamaug.preparation import ENGINE
from streamaug.progress import Progress
from streamaug.sampling.denoisers import inspect
from streamaug.sampling.denoisers.autoencoder import digest_of_tiny
from streamaug.stream.engine import Engine
from streamaug.stream.manifest import Manifest, Recorded, check_of, versions
from streamaug.stream.producer import build_engine
from streamaug.stream.ring import STAGES, Layout, Slot

log = logging.getLogger("streamaug")

_MOVABLE = ("cache", "bank.path", "model.path", "model.tiny_vae", "model.upscaler", "model.device")
_SHARD_IMAGES = 10_000
_FORGOTTEN = "forgotten"
_EXPORTED = "exported.txt"  # what of an export is complete, and from which records it was made


@dataclass(frozen=True, eq=False)
class Made:
    """An image made again. pixels: uint8 [C, H, W]; reason: an index into REASONS; order: one of ORDER_DTYPE."""

    pixels: np.ndarray
    order: np.void
    start: int
    score: float
    reason: int

    @property
    def id(self) -> int:
        return int(self.order["id"])

    @property
    def label(self) -> int:
        return int(self.order["label"])


@dataclass(frozen=True)
class Replayed:
    """paths: the files written; left_out: a sentence on each id that was not."""

    paths: list[Path]
    left_out: list[str]


class Replayer:
    """Runs the engines of a manifest. A context manager: it sets torch's number of threads, and sets it back."""

    def __init__(self, manifest: Manifest, *, overrides: Sequence[str] = (), any_version: bool = False):
        """overrides: "model.path=FOLDER" and the like, for what was moved; any_version: also where images may come
        out otherwise, because versions or the device differ.

        Raises UsageError for an override that is none of these.
        """
        self.manifest = manifest
        self.any_version = any_version
        self.moved = _parsed(overrides)
        self.differing = 0  # batches that came out otherwise than they were delivered
        self._run: int | None = None
        self._judge: int | None = None
        self._engine: Engine | None = None
        self._threads = torch.get_num_threads()

    def make(self, batch: Recorded, *, rejected: bool = False) -> list[Made]:
        """The batch's accepted images in the order of their delivery, or the rejected ones.

        Raises MismatchError when model, bank or versions are not the run's, or the batch does not come out as it was
        delivered, unless that was allowed.
        """
        engine = self._engine_for(batch)
        order, reasons = self.manifest.contents(batch)
        slot = _slot(len(order), engine.image_shape)
        made = engine.make(order, slot)
        count = made if isinstance(made, int) else made.wait()
        slot.finish(count, abandoned=False, began_ns=0, ended_ns=0, stage_ns=[0] * len(STAGES))
        same_judgement = np.array_equal(slot.reasons, reasons)
        if not same_judgement or check_of(slot) != batch.check:
            self._differs(batch)
        if not rejected and same_judgement:
            at = slot.source[:count]
            pixels, scores = slot.images[:count], slot.scores[:count]
        else:
            at = np.flatnonzero((reasons > 0) == rejected)
            pixels, scores = _look(engine, order)
            pixels, scores = pixels[at], scores[at]
        return [
            Made(pixels[i], order.images[position], order.start, float(scores[i]), int(reasons[position]))
            for i, position in enumerate(at.tolist())
        ]

    def _differs(self, batch: Recorded) -> None:
        self.differing += 1
        if self.any_version:
            return
        raise MismatchError(
            f"batch {batch.k} does not come out as it was delivered: this machine's processor, libraries or kernels "
            "are not those of the run, or a file of the model was changed; --any-version writes what comes out"
        )

    def _engine_for(self, batch: Recorded) -> Engine:
        if self._engine is None or batch.run != self._run:
            self._engine = self._built(self.manifest.runs[batch.run])
            self._run, self._judge = batch.run, None
        if batch.judge is not None and batch.judge != self._judge:
            self._engine.load_judge(*self.manifest.judge(batch.judge))
            self._judge = batch.judge
        return self._engine

    def _built(self, run: Mapping[str, Any]) -> Engine:
        self._require_versions(run)
        options = run["engine_options"]
        if run["engine"] == ENGINE:
            options = relocated(options, self.moved)
            require_same_files(options, run["plan_extra"])
        elif self.moved:
            raise UsageError(f"--set {next(iter(self.moved))}: the run's engine {run['engine']} has no such setting")

        return build_engine(run["engine"], options, lambda: torch.set_num_threads(run["threads"]))

    def _require_versions(self, run: Mapping[str, Any]) -> None:
        here = versions(self.moved.get("model.device", run["device"]))
        differing = [
            f"{name} was {theirs} and is {here.get(name)} now"
            for name, theirs in run["versions"].items()
            if here.get(name) != theirs
        ]
        if not differing:
            return
        text = f"images are the same bit for bit only with the run's versions: {'; '.join(differing)}"
        if not self.any_version:
            raise MismatchError(f"{text}. Install those, or allow small differences with --any-version")
        log.warning("%s", text)

    def __enter__(self) -> "Replayer":
        return self

    def __exit__(self, *exception: object) -> None:
        torch.set_num_threads(self._threads)
        if self.differing:
            log.warning("%d batches came out otherwise than they were delivered", self.differing)


def replay(
    manifest: Path,
    ids: Iterable[int],
    out: Path,
    *,
    rejected: bool = False,
    overrides: Sequence[str] = (),
    any_version: bool = False,
    progress: Progress,
) -> Replayed:
    """Write these images as out/ID-CLASS.png; with `rejected` also those that the judge rejected, as
    ID-CLASS-REASON.png.

    Raises UsageError for an id that the run never ordered, StreamaugError when the disk is full, and what `Replayer`
    raises.
    """
    with Manifest(manifest) as found, Replayer(found, overrides=overrides, any_version=any_version) as replayer:
        wanted = _by_batch(found, ids)
        names = _file_names(_last_run(found)["class_names"])
        progress.phase("making images again", total=sum(map(len, wanted.values())))
        done = Replayed([], [])
        for k, positions in wanted.items():
            batch = found.batches[k]
            order, reasons = found.contents(batch)
            kept: dict[int, bool] = {}  # id -> whether it was rejected
            for position in positions:
                number, reason = int(order.images["id"][position]), int(reasons[position])
                if reason and not rejected:
                    done.left_out.append(f"{number}: rejected ({REASONS[reason]}); --rejected writes it all the same")
                    continue
                if not reason and np.count_nonzero(reasons[:position] == 0) >= batch.delivered:
                    log.warning("%d was accepted, but the run ended or went back before it was delivered", number)
                kept[number] = reason > 0
            for group in sorted(set(kept.values())):
                for image in replayer.make(batch, rejected=group):
                    if image.id in kept:
                        reason_name = f"-{REASONS[image.reason]}" if image.reason else ""
                        done.paths.append(out / f"{image.id}-{names[image.label]}{reason_name}.png")
                        _write(done.paths[-1], _png(image.pixels))
            progress.advance(len(positions))
    return done


def export(
    manifest: Path,
    out: Path,
    form: str,
    *,
    ids: tuple[int, int] | None = None,
    overrides: Sequence[str] = (),
    any_version: bool = False,
    progress: Progress,
) -> int:
    """Write all delivered images, or those with ids[0] <= id < ids[1]; returns how many `out` holds of them.

    form: "png", files out/CLASS/ID.png, or "webdataset", .tar shards in which an image is ID.png, ID.cls (its class's
    number) and ID.json (all that its order says). Batches, or shards, that an interrupted call completed are not made
    again. Raises StreamaugError when the disk is full, and what `Replayer` raises.
    """
    with Manifest(manifest) as found, Replayer(found, overrides=overrides, any_version=any_version) as replayer:
        work = _Export(replayer, out, ids, progress)
        progress.phase("writing images", total=work.total)
        if form == "png":
            work.write_folders()
        else:
            work.write_shards()
    return work.total


class _Export:
    """What is exported, and where to.

    Parts (batches, shards) are written whole or not at all. A file in `out` names those that are complete, each with a
    checksum of the records that it was made from: a run that went back since has its images replaced.
    """

    def __init__(self, replayer: Replayer, out: Path, ids: tuple[int, int] | None, progress: Progress):
        self.replayer, self.out, self.progress = replayer, out, progress
        self.low, self.high = ids or (0, 1 << 63)
        self.range_name = "" if ids is None else f"-{self.low}-{self.high}"
        self.names: list[str] = _last_run(replayer.manifest)["class_names"]
        self.batch_size = replayer.manifest.batch_size
        self.counts = {k: count for k, batch in replayer.manifest.batches.items() if (count := self._count(batch))}
        self.total = sum(self.counts.values())
        if not self.total:
            asked = "" if ids is None else f"--range {self.low}:{self.high}: "
            raise UsageError(f"{asked}none of its images was delivered; {_range_of(replayer.manifest)}")
        self.finished = _Finished(out / _EXPORTED)

    def _count(self, batch: Recorded) -> int:
        """How many of its images are delivered and in the range."""
        first = batch.k * self.batch_size
        if self.low <= first and first + self.batch_size <= self.high:
            return batch.delivered
        if first + self.batch_size <= self.low or self.high <= first:
            return 0
        order, reasons = self.replayer.manifest.contents(batch)
        ids = order.images["id"][reasons == 0][: batch.delivered]
        return int(((self.low <= ids) & (ids < self.high)).sum())

    def _images(self, k: int) -> list[Made]:
        batch = self.replayer.manifest.batches[k]
        return [one for one in self.replayer.make(batch)[: batch.delivered] if self.low <= one.id < self.high]

    def _content(self, ks: Sequence[int]) -> str:
        batches = [self.replayer.manifest.batches[k] for k in ks]
        text = repr([(batch.k, batch.digest, batch.delivered) for batch in batches])
        return f"{zlib.crc32(text.encode()):08x}"

    def write_folders(self) -> None:
        folders = [self.out / name for name in _file_names(self.names)]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        prefix = f"batch{self.range_name}-"
        contents = {f"{prefix}{k}": self._content([k]) for k in self.counts}
        outdated = self.finished.outdated(prefix, contents)
        self._remove_images({int(part.removeprefix(prefix)) for part in outdated})
        self.finished.forget(outdated)
        mixed = False
        for k, count in self.counts.items():
            part = f"{prefix}{k}"
            if not self.finished.has(part, contents[part]):
                self.finished.add(part, "begun")
                for image in self._images(k):
                    _write(folders[image.label] / f"{image.id}.png", _png(image.pixels))
                    mixed = mixed or float(image.order["label_mix"]) > 0
                self.finished.add(part, contents[part])
            self.progress.advance(count)
        if mixed:
            log.warning("labels are mixed: a folder names the first class only; --format webdataset keeps both")

    def _remove_images(self, ks: set[int]) -> None:
        files = (path for path in self.out.glob("*/*.png") if path.stem.isdigit()) if ks else ()
        for path in files:
            if self.low <= int(path.stem) < self.high and int(path.stem) // self.batch_size in ks:
                path.unlink()

    def write_shards(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        prefix, ks = f"images{self.range_name}-", list(self.counts)
        per_shard = max(_SHARD_IMAGES // self.batch_size, 1)
        shards = {
            f"{prefix}{begin // per_shard:05d}.tar": ks[begin : begin + per_shard]
            for begin in range(0, len(ks), per_shard)
        }
        contents = {name: self._content(part) for name, part in shards.items()}
        outdated = self.finished.outdated(prefix, contents)
        for name in outdated:
            (self.out / name).unlink(missing_ok=True)
        self.finished.forget(outdated)
        for name, part in shards.items():
            if self.finished.has(name, contents[name]) and (self.out / name).is_file():
                self.progress.advance(sum(self.counts[k] for k in part))
                continue
            self._write_shard(name, part)
            self.finished.add(name, contents[name])

    def _write_shard(self, name: str, ks: Sequence[int]) -> None:
        with _whole(self.out / name) as temporary, tarfile.open(temporary, "w") as tar:
            for k in ks:
                for image in self._images(k):
                    _add_sample(tar, image, k, self.names)
                self.progress.advance(self.counts[k])


def _add_sample(tar: tarfile.TarFile, image: Made, k: int, names: Sequence[str]) -> None:
    about = {name: image.order[name].tolist() for name in image.order.dtype.names or ()}
    about |= {"k": k, "start": image.start, "score": image.score, "class": names[image.label]}
    members = {"png": _png(image.pixels), "cls": str(image.label).encode(), "json": json.dumps(about).encode()}
    for extension, data in members.items():
        info = tarfile.TarInfo(f"{image.id:012d}.{extension}")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))


class _Finished:
    """The complete parts of an export: a text file of their names and checksums, of which the last line counts."""

    def __init__(self, path: Path):
        self._path = path
        lines = [line.split() for line in path.read_text().splitlines()] if path.is_file() else []
        self._done = dict(line for line in lines if len(line) == 2)

    def has(self, part: str, content: str) -> bool:
        return self._done.get(part) == content

    def outdated(self, prefix: str, contents: Mapping[str, str]) -> list[str]:
        """Parts "prefixNUMBER..." that are incomplete, were written from other records, or are no part any more."""
        return [
            part
            for part, content in self._done.items()
            if part.startswith(prefix)
            and part[len(prefix) :].partition(".")[0].isdigit()
            and content != _FORGOTTEN
            and contents.get(part) != content
        ]

    def forget(self, parts: Iterable[str]) -> None:
        for part in parts:
            self.add(part, _FORGOTTEN)

    def add(self, part: str, content: str) -> None:
        self._done[part] = content
        with _room_for(self._path), open(self._path, "a") as file:
            file.write(f"{part} {content}\n")


def _by_batch(manifest: Manifest, ids: Iterable[int]) -> dict[int, list[int]]:
    """k -> positions in the batch of these ids. Raises UsageError for one that was never ordered."""
    size = _last_run(manifest)["identity"]["batch_size"]
    wanted: dict[int, list[int]] = {}
    for number in dict.fromkeys(ids):
        k, position = divmod(number, size)
        if k not in manifest.batches:
            raise UsageError(f"--ids {number}: the run delivered from no batch with it; {_range_of(manifest)}")
        wanted.setdefault(k, []).append(position)
    return wanted


def _range_of(manifest: Manifest) -> str:
    if not manifest.batches:
        return f"{manifest.path} has no batch yet"
    identity = manifest.runs[-1]["identity"]
    size, rank, world_size = identity["batch_size"], identity["rank"], identity["world_size"]
    text = f"{manifest.path} has ids from {min(manifest.batches) * size} to {(max(manifest.batches) + 1) * size - 1}"
    if world_size > 1:
        text += f", of which rank {rank} of {world_size} made the batches k = {rank} modulo {world_size}"
    return f"{text} ({len(manifest.batches)} batches of {size})"


def _last_run(manifest: Manifest) -> dict[str, Any]:
    if not manifest.runs:
        raise UsageError(f"{manifest.path} has no batch yet: the run was ended before its first")
    return manifest.runs[-1]


def _parsed(overrides: Sequence[str]) -> dict[str, str]:
    moved = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not value:
            raise UsageError(f"--set {override}: expected key=value, such as model.path=models/sd")
        if key not in _MOVABLE:
            raise UsageError(
                f"--set {override}: a replay takes its settings from the manifest{nearest(key, _MOVABLE)}; what may "
                f"be elsewhere now: {', '.join(_MOVABLE)}"
            )
        moved[key] = os.path.expanduser(value)
    return moved


def relocated(options: Mapping[str, Any], moved: Mapping[str, str]) -> dict[str, Any]:
    """`engine.build`'s options with the paths of what was moved; all that was in the cache moves with it."""
    config = json.loads(json.dumps(options["config"]))
    paths = {name: options[name] for name in ("model", "bank", "prompts")}
    if "cache" in moved:
        old = Path(config["cache"])
        for name, path in paths.items():
            if path is not None and Path(path).is_relative_to(old):
                paths[name] = str(moved["cache"] / Path(path).relative_to(old))
        config["cache"] = moved["cache"]
    for key, value in moved.items():
        section, _, name = key.partition(".")
        if name:
            config[section][name] = value
        if name == "path":
            paths[section] = value
    return {**options, **paths, "config": config}


def require_same_files(options: Mapping[str, Any], plan_extra: Mapping[str, Any]) -> None:
    """Raise MismatchError unless model, bank and prompts are those of the run; UsageError when one is not there."""
    model, bank, prompts = options["model"], options["bank"], options["prompts"]
    for path, key in ((model, "model.path"), (bank, "bank.path"), (prompts, "cache")):
        if path is not None and not Path(path).exists():
            raise UsageError(f"{path}: not there any more; say where it was moved with --set {key}=FOLDER")
    settings = options["config"]["model"]
    upscaler = settings["upscaler"]
    info = inspect(
        Path(model),
        options["config"]["data"]["image_size"],
        settings["variant"],
        None if upscaler is None else Path(upscaler),
    )
    _require_same("model", model, info.digest, plan_extra["model"], "model.path")
    if settings["tiny_vae"] is not None:
        tiny = settings["tiny_vae"]
        _require_same("tiny autoencoder", tiny, digest_of_tiny(Path(tiny)), plan_extra["tiny_vae"], "model.tiny_vae")
    _require_same("bank", bank, LatentBank.open(Path(bank)).digest, plan_extra["bank"], "bank.path")
    if prompts is not None:
        _require_same("encoded prompts", prompts, Path(prompts).stem, plan_extra["prompts"], "cache")


def _require_same(what: str, path: str, here: str, theirs: str, key: str) -> None:
    if here != theirs:
        raise MismatchError(
            f"the {what} in {path} is not the run's: its digest is {here}, the run's was {theirs}; "
            f"--set {key}=FOLDER names another place"
        )


def _slot(size: int, image_shape: Sequence[int]) -> Slot:
    channels, height, width = image_shape
    layout = Layout(size, (channels, height, width), 1)
    return Slot(memoryview(bytearray(layout.slot_nbytes)), layout)


def _look(engine: Engine, order: OrderBatch) -> tuple[np.ndarray, np.ndarray]:
    """All images of an order, uint8 [B, C, H, W], and their scores fp32 [B]."""
    look = getattr(engine, "look", None)
    if look is None:
        raise UsageError("the run's engine does not give rejected images out: it has no method `look`")
    pixels, scores, _ = look(order)
    return pixels, scores


def _png(pixels: np.ndarray) -> bytes:
    """pixels: uint8 [1, H, W] or [3, H, W]."""
    data = io.BytesIO()
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(data, "png")
    return data.getvalue()


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all when the process is killed; millions of files are not waited for one by one."""
    with _whole(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A file to write, which becomes `path` unless writing it fails. Raises StreamaugError when there is no room."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        with _room_for(path):
            yield temporary
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def _room_for(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise StreamaugError(
            f"{path}: cannot be written: {error.strerror}; make room there and run the same command again: what is "
            "complete is not made again"
        ) from None


def _file_names(class_names: Sequence[str]) -> list[str]:
    """A file name for each class: what cannot be in one becomes _; a name that then is taken gets its number."""
    names: list[str] = []
    for label, name in enumerate(class_names):
        plain = re.sub(r"[^\w.\- ]", "_", name).strip(". ") or "class"
        names.append(f"{plain}-{label}" if plain.lower() in (taken.lower() for taken in names) else plain)
    return names


def parse_range(text: str) -> tuple[int, int]:
    """ "100:200" as (100, 200). Raises UsageError."""
    low, colon, high = text.partition(":")
    if not colon or not low.isdigit() or not high.isdigit() or int(low) >= int(high):
        raise UsageError(f"--range {text}: expected two ids FROM:TO, such as 0:10000 (TO is left out)")
    return int(low), int(high)

"""The manifest of a run: every batch of orders that was delivered from, so that its images can be made again.

One file, appended to: a line that names the format, then records of kind, length, checksum and contents. A record is
written before the first image of its batch is delivered. It holds the whole OrderBatch, so nothing has to be planned
again, in at most 64 bytes an image; of a live judge each state that judged a batch is added once, as it is. A process
that is killed loses no record; a machine that goes down loses those of the last SYNC_SECONDS. A record that was cut
short is noticed, and cut off when the run goes on.
"""

import fcntl
import json
import logging
import mmap
import os
import platform
import re
import struct
import time
import weakref
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from streamaug.errors import StateError, StreamaugError, UsageError
from streamaug.orders import HEAD_DTYPE, ORDER_DTYPE, OrderBatch
from streamaug.stream.arrays import as_array
from streamaug.stream.position import Identity, Position
from streamaug.stream.ring import Slot

log = logging.getLogger("streamaug")

SYNC_SECONDS = 30.0

_MAGIC = b"streamaug manifest 2\n"
_FRAME = struct.Struct("<BII")  # kind, bytes of the contents, checksum of kind, bytes and contents
_RUN, _JUDGE, _BATCH, _POSITION = range(1, 5)
_JUDGE_HEAD = struct.Struct("<q")  # version
_BATCH_HEAD = struct.Struct("<qqII")  # k, judge version, accepted images, `check_of` them
# Of a batch's or a position's record, wherever it is: what is compressed, and JSON objects, begin like this.
_BEGINNING = re.compile(
    rb"(?=%c.{%d}\x78\x01|%c.{%d}\{)" % (_BATCH, _FRAME.size + _BATCH_HEAD.size - 1, _POSITION, _FRAME.size - 1),
    re.DOTALL,
)
_CHECKED_NBYTES = 65536  # of a batch's pixels, at least one image
_IDENTITY = ("plan", "batch_size", "rank", "world_size", "judge_nbytes")
_EVERYTHING = {"undelivered": [], "offsets": [], "next_k": -(1 << 63)}


def versions(device: str) -> dict[str, str]:
    """What images depend on besides the run's own settings: bit for bit the same only where these are.

    device: "cpu", "cuda", "cuda:1" or "auto".
    """
    return {package: _version(package) for package in ("streamaug", "torch", "diffusers")} | {"device": _model(device)}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _model(device: str) -> str:
    if device != "cpu":
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name(None if device == "auto" else device)
    return platform.machine()


def check_of(slot: Slot) -> int:
    """A checksum by which a batch that is made again is known to be the same.

    Of the accepted images' scores, which come from all pixels when there is a judge, and of the first images whole.
    """
    count = slot.count
    first = max(_CHECKED_NBYTES // max(slot.images[0].nbytes, 1), 1)
    return zlib.crc32(as_array(slot.images[: min(count, first)]).data, zlib.crc32(slot.scores[:count].data))


def path_of_rank(path: Path, rank: int, world_size: int) -> Path:
    """Each rank writes its own file: run.manifest, or run.manifest.rank3."""
    return path if world_size == 1 else path.with_name(f"{path.name}.rank{rank}")


class ManifestWriter:
    """The trainer's side: appends to a new manifest, or to that of the run which goes on."""

    def __init__(
        self,
        path: Path,
        identity: Identity,
        *,
        engine: str,
        engine_options: Mapping[str, Any],
        image_shape: Sequence[int],
        class_names: Sequence[str],
        plan_extra: Mapping[str, Any] | None,
        device: str,
        threads: int,
    ):
        """identity: of the stream; threads: CPU threads that its engine runs with; the rest as `Stream` has it.

        Raises StateError when the file is another run's, UsageError when it is none, is damaged, or another process
        writes it.
        """
        self.path = path_of_rank(path, identity.rank, identity.world_size)
        run = {
            "identity": {name: value for name, value in asdict(identity).items() if name in _IDENTITY},
            "versions": versions(device),
            "engine": engine,
            "engine_options": engine_options,
            "image_shape": list(image_shape),
            "class_names": list(class_names),
            "plan_extra": dict(plan_extra or {}),
            "device": device,
            "threads": threads,
            "orders": _FIELDS,
        }
        self._judges: dict[int, int] = {}  # version -> checksum of the state that the file has last
        self._current_judges: set[int] = set()  # versions whose state in the file is the one in use
        # Written before the next batch: what of the file still stands. A run that does not go on begins anew.
        self._stands: dict[str, Any] | None = _EVERYTHING
        self._recorded = False  # whether this process wrote a batch: one that delivers nothing undoes nothing
        self._end = 0
        self._synced = time.monotonic()
        self._file = _open_locked(self.path)
        try:
            self._continue(run)
        except BaseException:
            self._file.close()
            raise
        _writers.add(self)

    def _continue(self, run: dict[str, Any]) -> None:
        """Find the end of what is there, cut off a torn record, and say which run goes on."""
        last: dict[str, Any] | None = None
        with Manifest(self.path) as found:
            last = found.runs[-1] if found.runs else None
            self._judges = found.judge_checks()
            self._end = found.end
        if found.torn:
            log.warning("%s: the last %d bytes were not written whole and are cut off", self.path, found.torn)
        if last is not None:
            _require_same_run(self.path, last["identity"], run["identity"])
        self._file.truncate(self._end)
        if self._end == 0:
            self._write(_MAGIC)
        if last != json.loads(json.dumps(run)):
            self._append(_RUN, zlib.compress(json.dumps(run).encode()))

    def opened(self, order: OrderBatch, slot: Slot, judges: Mapping[int, np.ndarray]) -> None:
        """A batch is about to be delivered from. judges: the states of the live judge by version, uint8."""
        if self._stands is not None:
            self._append(_POSITION, json.dumps(self._stands).encode())
            self._stands = None
        version = order.judge_version
        if version in judges and version not in self._current_judges:
            self._append_judge(version, judges[version])
        self._recorded = True
        self._append(_BATCH, _packed(order, slot))
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self._sync()

    def _append_judge(self, version: int, state: np.ndarray) -> None:
        check = zlib.crc32(state.data)
        if self._judges.get(version) != check:
            self._append(_JUDGE, _JUDGE_HEAD.pack(version) + state.tobytes())
            self._judges[version] = check
        self._current_judges.add(version)

    def resumed(self, position: Position) -> None:
        """The stream went to another place: what was delivered after it, was not."""
        self._stands = _as_json(position)
        self._current_judges.clear()

    def mark(self, position: Position) -> None:
        """Record how far the batches were delivered that this process wrote."""
        if self._recorded:
            self._append(_POSITION, json.dumps(_as_json(position)).encode())
            self._stands = None

    def close(self, position: Position) -> None:
        """Mark the end and let go of the file. May be called twice; never raises."""
        if self._file.closed:
            return
        try:
            self.mark(position)
            self._sync()
        except (OSError, StreamaugError) as error:
            log.warning("the end is not marked, so the last batch counts as delivered whole: %s", error)
        finally:
            self._file.close()

    def let_go(self) -> None:
        """In a forked child: the lock is the parent's."""
        self._file.close()

    def _append(self, kind: int, contents: bytes) -> None:
        self._write(_frame(kind, contents))

    def _write(self, data: bytes) -> None:
        done = 0
        try:
            while done < len(data):
                # At the end of what is known to be whole: a call that failed or was interrupted is written over.
                done += os.pwrite(self._file.fileno(), data[done:], self._end + done)
        except OSError as error:
            raise StreamaugError(
                f"{self.path}: cannot be written: {error.strerror}. No image is lost: make room and take again, or go "
                "on from the saved state without stream.manifest"
            ) from None
        self._end += len(data)

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()


@dataclass(frozen=True)
class Recorded:
    """One batch of the manifest: the last of its k."""

    k: int
    accepted: int  # images that the judge let through
    delivered: int  # the first of them that the run delivered and did not go back behind
    check: int  # `check_of` its slot
    run: int  # index into `Manifest.runs`
    judge: int | None  # which of the file's judges, for `Manifest.judge`
    digest: int  # checksum of the record
    at: tuple[int, int]  # where in the file its contents are


class Manifest:
    """A manifest opened for reading, also while the run goes on.

    runs: what each process that wrote it said of itself, first to last; batches: by k, in the order in which they were
    delivered; torn: bytes at the end that were not written whole. Of batches that were delivered twice, because the
    run went back, the last counts.
    """

    def __init__(self, path: str | os.PathLike):
        """Raises UsageError when there is no such file, it is no manifest, or it is damaged before its end."""
        self.path = Path(path)
        self.runs: list[dict[str, Any]] = []
        self.batches: dict[int, Recorded] = {}
        self.end = 0
        self._judges: list[tuple[int, int, int]] = []  # version, begin and end of the state in the file
        self._map = _mapped(self.path)
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def _read(self) -> None:
        data = self._map
        if not _MAGIC.startswith(data[: len(_MAGIC)]):
            raise UsageError(f"{self.path}: not a manifest of this version: it does not begin with {_MAGIC!r}")
        newest: dict[int, int] = {}  # judge version -> index into _judges
        self.end = len(_MAGIC) if len(data) >= len(_MAGIC) else 0
        while self.end and (frame := _frame_at(data, self.end)) is not None:
            kind, begin, end, digest = frame
            if kind == _RUN:
                self._begin(json.loads(zlib.decompress(data[begin:end])))
            elif kind == _JUDGE:
                (version,) = _JUDGE_HEAD.unpack_from(data, begin)
                newest[version] = len(self._judges)
                self._judges.append((version, begin + _JUDGE_HEAD.size, end))
            elif kind == _BATCH:
                k, version, accepted, check = _BATCH_HEAD.unpack_from(data, begin)
                self.batches.pop(k, None)
                run, judge = len(self.runs) - 1, newest.get(version)
                at = begin + _BATCH_HEAD.size, end
                self.batches[k] = Recorded(k, accepted, accepted, check, run, judge, digest, at)
            elif kind == _POSITION:
                self._stand(**json.loads(data[begin:end]))
            self.end = end
        self._refuse_damage()
        self.torn = len(data) - self.end

    def _begin(self, run: dict[str, Any]) -> None:
        if run["orders"] != _FIELDS:
            raise UsageError(
                f"{self.path}: its orders have other fields than this version's; read it with streamaug "
                f"{run['versions']['streamaug']}"
            )
        self.runs.append(run)

    def _stand(self, undelivered: list[int], offsets: list[int], next_k: int) -> None:
        """Of what was recorded, only this was delivered: see `Position`."""
        delivered = dict.fromkeys((k for k in self.batches if k >= next_k), 0)
        for k, offset in zip(undelivered, offsets, strict=True):
            if k in self.batches:
                delivered[k] = min(offset, self.batches[k].accepted)
        for k, number in delivered.items():
            self.batches[k] = replace(self.batches[k], delivered=number)

    def _refuse_damage(self) -> None:
        """A torn record is the last one: one that others follow was written whole and changed since."""
        if self.end and _holds_frame_after(self._map, self.end):
            raise UsageError(
                f"{self.path}: damaged at byte {self.end} of {len(self._map)}: restore it from a copy, or give the run "
                "another stream.manifest"
            )

    def contents(self, batch: Recorded) -> tuple[OrderBatch, np.ndarray]:
        """The batch's orders, and what became of each: uint8 [B], an index into REASONS."""
        return _unpacked(zlib.decompress(self._map[slice(*batch.at)]), self.batch_size)

    def judge(self, index: int) -> tuple[int, np.ndarray]:
        """(version, state uint8 [n]) of a live judge."""
        version, begin, end = self._judges[index]
        return version, np.frombuffer(self._map[begin:end], np.uint8)

    def judge_checks(self) -> dict[int, int]:
        """The checksum of the newest state of each version of the live judge."""
        newest = {version: index for index, (version, _, _) in enumerate(self._judges)}
        return {version: zlib.crc32(self.judge(index)[1].data) for version, index in newest.items()}

    @property
    def batch_size(self) -> int:
        return self.runs[-1]["identity"]["batch_size"]

    def close(self) -> None:
        if isinstance(self._map, mmap.mmap):
            self._map.close()

    def __enter__(self) -> "Manifest":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


_FIELDS = [[name, ORDER_DTYPE[name].str, list(ORDER_DTYPE[name].shape)] for name in ORDER_DTYPE.names or ()]
_writers: weakref.WeakSet[ManifestWriter] = weakref.WeakSet()


def _let_go_in_child() -> None:
    for writer in list(_writers):
        writer.let_go()


os.register_at_fork(after_in_child=_let_go_in_child)


def _packed(order: OrderBatch, slot: Slot) -> bytes:
    """A batch's record. Byte n of every image stands together: most of these planes hold one value."""
    head = _BATCH_HEAD.pack(order.k, order.judge_version, slot.count, check_of(slot))
    whole = np.zeros(1, HEAD_DTYPE)
    whole[0] = (order.k, order.start, order.plan_version, order.judge_version, order.origin)
    images = order.images.copy()
    images["id"] -= _usual_ids(order.k, len(order))
    planes = images.view(np.uint8).reshape(len(order), -1).T
    return head + zlib.compress(whole.tobytes() + slot.reasons.tobytes() + planes.tobytes(), 1)


def _unpacked(data: bytes, batch_size: int) -> tuple[OrderBatch, np.ndarray]:
    k, start, plan_version, judge_version, origin = np.frombuffer(data, HEAD_DTYPE, 1)[0].tolist()
    reasons = np.frombuffer(data, np.uint8, batch_size, HEAD_DTYPE.itemsize)
    planes = np.frombuffer(data, np.uint8, offset=HEAD_DTYPE.itemsize + batch_size)
    images = planes.reshape(-1, batch_size).T.copy().view(ORDER_DTYPE).reshape(batch_size)
    images["id"] += _usual_ids(k, batch_size)
    return OrderBatch(k, start, plan_version, judge_version, images, origin), reasons


def _usual_ids(k: int, batch_size: int) -> np.ndarray:
    return k * batch_size + np.arange(batch_size)


def _as_json(position: Position) -> dict[str, Any]:
    return {
        "undelivered": [k for k, _, _ in position.undelivered],
        "offsets": position.offsets,
        "next_k": position.next_k,
    }


def _frame(kind: int, contents: bytes) -> bytes:
    return _FRAME.pack(kind, len(contents), _checksum(kind, contents)) + contents


def _frame_at(data: mmap.mmap | bytes, at: int) -> tuple[int, int, int, int] | None:
    """(kind, begin and end of its contents, checksum) of the whole record there; None when there is none."""
    begin = at + _FRAME.size
    if begin > len(data):
        return None
    kind, nbytes, checksum = _FRAME.unpack_from(data, at)
    end = begin + nbytes
    if end > len(data) or _checksum(kind, data[begin:end]) != checksum:
        return None
    return kind, begin, end, checksum


def _holds_frame_after(data: mmap.mmap | bytes, at: int) -> bool:
    """Whether a whole record of a batch or a position begins anywhere behind `at`: the length that is there may be
    wrong."""
    return any(_frame_at(data, found.start()) is not None for found in _BEGINNING.finditer(data, at + 1))


def _checksum(kind: int, contents: bytes) -> int:
    return zlib.crc32(contents, zlib.crc32(struct.pack("<BI", kind, len(contents))))


def _open_locked(path: Path) -> Any:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        file = open(path, "r+b", buffering=0)  # noqa: SIM115
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be written: {error.strerror}; set stream.manifest to a path that can"
        ) from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UsageError(
            f"{path}: another stream is writing this manifest; wait for it to end, or set stream.manifest to another"
        ) from None
    return file


def _mapped(path: Path) -> mmap.mmap | bytes:
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) if size else b""
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be read: {error.strerror}; expected the file that stream.manifest named"
        ) from None


def _require_same_run(path: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    for name, value in ours.items():
        if theirs.get(name) != value:
            raise StateError(
                f"{path} is another run's manifest: {_NAMES.get(name, name)} was {theirs.get(name)} there and is "
                f"{value} now; set stream.manifest to another path"
            )


_NAMES = {
    "plan": "the plan (seed, recipes, bank or model)",
    "batch_size": "stream.batch_size",
    "judge_nbytes": "the size of the judge in bytes",
}

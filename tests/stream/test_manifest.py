"""The manifest: whole orders and keep masks in few bytes, nothing lost to a kill, and what a run undid is undone."""

import errno
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamaug.config import Recipe
from streamaug.errors import StateError, StreamaugError, UsageError
from streamaug.orders import ORDER_DTYPE, REASONS, OrderBatch, Planner, Schedule
from streamaug.stream.manifest import Manifest, ManifestWriter, _frame_at, check_of
from streamaug.stream.position import Identity, Position
from streamaug.stream.steering import Steering

from .fakes import images_of, listed, make_stream

IDENTITY = Identity(
    batch_size=8, in_flight=4, rank=0, world_size=1, threads=1, judge_nbytes=16, plan="plan", first_judge=None
)
RUN = {
    "engine": "streamaug.stream.hashing:build",
    "engine_options": {"image_shape": [1, 8, 8]},
    "image_shape": (1, 8, 8),
    "class_names": ["a", "b"],
    "plan_extra": None,
    "device": "cpu",
    "threads": 1,
}


def writer_of(path: Path, **identity: object) -> ManifestWriter:
    return ManifestWriter(path, replace(IDENTITY, **identity), **RUN)


def slot_of(reasons: np.ndarray) -> SimpleNamespace:
    size = len(reasons)
    return SimpleNamespace(
        reasons=reasons.astype(np.uint8),
        count=int((reasons == 0).sum()),
        scores=np.linspace(0, 1, size, dtype=np.float32),
        images=np.zeros((size, 1, 8, 8), np.uint8),
    )


def order_of(k: int, size: int = 8, judge_version: int = 0) -> OrderBatch:
    images = np.zeros(size, ORDER_DTYPE)
    images["id"] = k * size + np.arange(size)
    return OrderBatch(k, 3, 1, judge_version, images)


def position_at(undelivered: list[int], offset: int, next_k: int) -> Position:
    names = [(k, 0, 0) for k in undelivered]
    offsets = [offset, *[0] * (len(names) - 1)] if names else []
    return Position(names, offsets, next_k, 0, {}, 0, None, {}, 0, Steering(np.ones(2)))


def write(path: Path, ks: range, position: Position | None = None) -> None:
    writer = writer_of(path)
    if position is not None:
        writer.resumed(position)
    for k in ks:
        writer.opened(order_of(k), slot_of(np.zeros(8)), {})
    writer.close(position_at([], 0, ks.stop))


def delivered(path: Path) -> dict[int, int]:
    with Manifest(path) as found:
        return {k: batch.delivered for k, batch in found.batches.items()}


def same_order(one: OrderBatch, other: OrderBatch) -> bool:
    heads = [(each.k, each.start, each.plan_version, each.judge_version, each.origin) for each in (one, other)]
    return heads[0] == heads[1] and one.images.tobytes() == other.images.tobytes()


# The format.

numbers = st.integers(-(2**62), 2**62)


@st.composite
def written_batches(draw):
    size = draw(st.integers(1, 70))
    count = draw(st.integers(1, 4))
    batches = []
    for k in draw(st.lists(st.integers(0, 2**40), min_size=count, max_size=count, unique=True)):
        data = draw(st.binary(min_size=ORDER_DTYPE.itemsize, max_size=ORDER_DTYPE.itemsize))
        images = np.frombuffer(data * size, ORDER_DTYPE).copy()
        images["t"] += np.arange(size, dtype=np.float32)
        reasons = np.array(draw(st.lists(st.integers(0, len(REASONS) - 1), min_size=size, max_size=size)))
        head = [draw(numbers) for _ in range(3)]
        batches.append((OrderBatch(k, *head, images, draw(st.integers(0, 1))), reasons))
    return size, batches


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(written_batches())
@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.filterwarnings("ignore:overflow")
def test_whatever_a_batch_holds_it_is_read_as_it_was_written(tmp_path, written):
    size, batches = written
    path = tmp_path / "run.manifest"
    path.unlink(missing_ok=True)
    writer = writer_of(path, batch_size=size)
    judges = {order.judge_version: np.full(16, k % 256, np.uint8) for k, (order, _) in enumerate(batches)}
    for order, reasons in batches:
        writer.opened(order, slot_of(reasons), judges)
    writer.close(position_at([], 0, 2**41))
    with Manifest(path) as found:
        assert list(found.batches) == [order.k for order, _ in batches]
        assert found.torn == 0
        for order, reasons in batches:
            batch = found.batches[order.k]
            again, masks = found.contents(batch)
            assert same_order(again, order)
            assert masks.tolist() == reasons.tolist()
            assert batch.accepted == batch.delivered == (reasons == 0).sum()
            version, state = found.judge(batch.judge)
            assert (version, state.tolist()) == (order.judge_version, judges[order.judge_version].tolist())


def test_a_record_torn_at_any_byte_is_noticed_and_cut_and_all_before_it_is_whole(tmp_path, caplog):
    path, torn = tmp_path / "run.manifest", tmp_path / "torn.manifest"
    write(path, range(3))
    before = path.stat().st_size
    writer = writer_of(path)
    writer.resumed(position_at([], 0, 3))
    writer.opened(order_of(3), slot_of(np.zeros(8)), {})
    del writer  # as a kill leaves it: without the mark of its end
    whole = path.read_bytes()
    with Manifest(path) as found:
        last = max(at for at in range(before, found.batches[3].at[0]) if _frame_at(whole, at))
    for end in range(last, len(whole)):
        torn.write_bytes(whole[:end])
        with Manifest(torn) as found:
            assert list(found.batches) == [0, 1, 2]
            assert found.torn == end - last
            assert same_order(found.contents(found.batches[2])[0], order_of(2))
    write(torn, range(3, 5), position_at([], 0, 3))
    assert delivered(torn) == dict.fromkeys(range(5), 8)
    assert f"the last {len(whole) - 1 - last} bytes were not written whole" in caplog.text


def test_a_file_torn_in_its_first_line_or_header_begins_anew(tmp_path):
    path = tmp_path / "run.manifest"
    write(path, range(2))
    whole = path.read_bytes()
    for end in (0, 5, 21, 30, 100):
        path.write_bytes(whole[:end])
        write(path, range(2))
        assert delivered(path) == {0: 8, 1: 8}


def test_a_byte_changed_before_the_end_is_refused_and_nothing_is_cut(tmp_path):
    path = tmp_path / "run.manifest"
    write(path, range(20))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    for look in (Manifest, writer_of):
        with pytest.raises(UsageError, match=rf"damaged at byte \d+ of {len(data)}"):
            look(path)
    assert path.read_bytes() == data


def test_any_byte_of_a_record_before_the_last_may_be_changed_its_length_too_and_nothing_is_cut(tmp_path):
    path = tmp_path / "run.manifest"
    write(path, range(4))
    whole = path.read_bytes()
    with Manifest(path) as found:
        begin, end = found.batches[1].at[1], found.batches[2].at[1]
    for at in range(begin, end):
        for bit in (0, 7):
            data = bytearray(whole)
            data[at] ^= 1 << bit
            path.write_bytes(data)
            with pytest.raises(UsageError, match=rf"damaged at byte {begin} of"):
                Manifest(path)
    with pytest.raises(UsageError, match="damaged"):
        writer_of(path)
    assert path.read_bytes() == data


def test_what_is_no_manifest_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "notes"
    path.write_text("my notes")
    for look in (Manifest, writer_of):
        with pytest.raises(UsageError, match="not a manifest"):
            look(path)
    assert path.read_text() == "my notes"
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        Manifest(tmp_path / "none")


RECIPES = {
    "noise": Recipe(kind="noise"),
    "mixed": Recipe(kind="interpolate", pairs="mixed", guidance=(1, 5), classifier_guidance=(0, 2)),
    "embedding": Recipe(kind="embedding", alpha=(0, 1), lambd=(0, 1), guidance=(1, 5), classifier_guidance=(0, 2)),
}


@pytest.mark.parametrize(("recipe", "most"), [("noise", 9), ("mixed", 40), ("embedding", 40)])
def test_an_image_takes_few_bytes_even_where_everything_varies(tmp_path, recipe, most):
    classes, batches = 1000, 200
    schedule = Schedule(np.linspace(0, 1, 51), np.linspace(1, 0, 51))
    planner = Planner(np.arange(100_000) % classes, classes, schedule, [RECIPES[recipe]], 64, 0)
    writer = writer_of(tmp_path / "run.manifest", batch_size=64)
    rng = np.random.default_rng(0)
    for k in range(batches):
        reasons = rng.integers(1, len(REASONS), 64) * (rng.random(64) < 0.3)
        writer.opened(planner.batch(k, planner.uniform(k)), slot_of(reasons), {})
    writer.close(position_at([], 0, batches))
    nbytes = (tmp_path / "run.manifest").stat().st_size / (64 * batches)
    assert nbytes <= most <= 64


# What a stream writes.


def test_a_stream_writes_the_orders_and_masks_of_what_it_delivers(tmp_path):
    path = tmp_path / "run.manifest"
    judge = np.zeros(16, np.uint8)
    with make_stream(manifest=path, backend="local", judge=judge, engine_options={"reject": 0.4}) as stream:
        got = []
        for step in range(12):
            batch = stream.take(7)
            got += images_of(batch)
            stream.feedback(batch.labels, 0.5 + batch.labels)
            if step % 4 == 1:
                stream.publish_judge(np.full(16, step, np.uint8))
    with Manifest(path) as found:
        ids, versions = [], []
        for batch in found.batches.values():
            order, reasons = found.contents(batch)
            ids += order.images["id"][reasons == 0][: batch.delivered].tolist()
            versions.append((order.judge_version, found.judge(batch.judge)[1][0]))
    assert ids == [image[0] for image in got]
    assert {1: 1, 2: 5, 0: 0}.items() <= dict(versions).items()


def test_a_batch_is_in_the_file_before_its_first_image_is_delivered(tmp_path):
    path = tmp_path / "run.manifest"
    with make_stream(manifest=path, backend="local") as stream:
        for k in range(3):
            stream.take(1 if k == 0 else 8)
            assert list(delivered(path)) == list(range(k + 1))


def test_an_interrupted_take_is_marked_as_not_delivered(tmp_path, monkeypatch):
    path = tmp_path / "run.manifest"
    with make_stream(manifest=path, backend="local") as stream:
        stream.take(3)
        copy, calls = stream._delivery._copy, []

        def stop_in_the_middle(*arguments):
            copy(*arguments)
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt

        monkeypatch.setattr(stream._delivery, "_copy", stop_in_the_middle)
        with pytest.raises(KeyboardInterrupt):
            stream.take(30)
    assert delivered(path) == {0: 3, 1: 0}


def test_a_resumed_run_appends_and_what_was_delivered_after_its_state_is_undone(tmp_path):
    path = tmp_path / "run.manifest"
    with make_stream(manifest=path, backend="local") as stream:
        stream.take(13)
        state = stream.state_dict()
        stream.take(30)
    assert delivered(path) == {0: 8, 1: 8, 2: 8, 3: 8, 4: 8, 5: 3}
    with make_stream(manifest=path, backend="local", producers=2) as stream:
        stream.load_state_dict(state)
        stream.take(6)
    assert delivered(path) == {0: 8, 1: 8, 2: 3, 3: 0, 4: 0, 5: 0}
    with Manifest(path) as found:
        assert len(found.runs) == 1, "what a run says of itself is not written twice"
    with make_stream(manifest=path, backend="local") as stream:
        stream.take(2)
    assert delivered(path) == {0: 2, 1: 0, 2: 0, 3: 0, 4: 0, 5: 0}, "a run that begins anew undoes all"


def test_a_batch_in_a_gpus_memory_has_the_checksum_that_it_has_in_the_hosts():
    import torch

    slot = slot_of(np.zeros(8))
    slot.images[:] = np.arange(64, dtype=np.uint8).reshape(1, 1, 8, 8)
    apart = SimpleNamespace(count=slot.count, scores=slot.scores, images=torch.from_numpy(slot.images.copy()))
    assert check_of(apart) == check_of(slot)
    apart.images[0, 0, 0, 0] ^= 1
    assert check_of(apart) != check_of(slot)


def test_a_stream_that_delivers_nothing_undoes_nothing(tmp_path):
    path = tmp_path / "run.manifest"
    with make_stream(manifest=path, backend="local") as stream:
        stream.take(13)
    size = path.stat().st_size
    with make_stream(manifest=path, backend="local"):
        pass
    assert path.stat().st_size == size


def test_a_running_stream_that_goes_back_writes_the_judge_of_its_new_future(tmp_path):
    path = tmp_path / "run.manifest"
    with make_stream(manifest=path, backend="local", judge=np.zeros(16, np.uint8)) as stream:
        stream.take(8)
        state = stream.state_dict()
        stream.publish_judge(np.full(16, 1, np.uint8))
        listed(stream, [48])
        stream.load_state_dict(state)
        stream.publish_judge(np.full(16, 2, np.uint8))
        listed(stream, [48])
    with Manifest(path) as found:
        last = found.batches[6]
        assert last.delivered == 8
        assert (found.judge(last.judge)[0], found.judge(last.judge)[1][0]) == (1, 2)


def test_replanning_marks_how_far_the_batch_in_delivery_came(tmp_path):
    path = tmp_path / "run.manifest"
    with make_stream(manifest=path, backend="local") as stream:
        stream.take(11)
        stream.replan(class_weights=[1, 0, 0, 0], first_k=50)
        stream.take(8)
    assert delivered(path) == {0: 8, 1: 3, 50: 8}


def test_another_run_is_refused_with_both_values(tmp_path):
    path = tmp_path / "run.manifest"
    with make_stream(manifest=path, backend="local", seed=0) as stream:
        stream.take(1)
    with pytest.raises(StateError, match=r"another run's manifest: the plan .* was \w{16} there and is \w{16} now"):
        make_stream(manifest=path, backend="local", seed=1)
    with pytest.raises(StateError, match=r"another run's"):
        make_stream(manifest=path, backend="local", batch_size=16)


def test_each_rank_writes_a_file_of_its_own(tmp_path):
    for rank in (0, 1):
        with make_stream(manifest=tmp_path / "m", backend="local", rank=rank, world_size=2) as stream:
            stream.take(16)
    assert delivered(tmp_path / "m.rank0") == {0: 8, 2: 8}
    assert delivered(tmp_path / "m.rank1") == {1: 8, 3: 8}


def test_two_streams_cannot_write_one_manifest_and_a_fork_does_not_keep_it(tmp_path):
    path = tmp_path / "run.manifest"
    with make_stream(manifest=path, backend="local"):
        with pytest.raises(UsageError, match="another stream is writing this manifest"):
            make_stream(manifest=path, backend="local")
        reader, until_closed = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(until_closed)
            os.read(reader, 1)
            os._exit(0)
    try:
        make_stream(manifest=path, backend="local").close()
    finally:
        os.close(until_closed)
        os.close(reader)
        os.waitpid(child, 0)


def test_a_full_disk_stops_take_with_a_message_and_loses_no_image(tmp_path, monkeypatch):
    path = tmp_path / "run.manifest"
    with make_stream(manifest=path, backend="local") as stream:
        got = listed(stream, [8])
        pwrite = os.pwrite

        def full(fd: int, data: bytes, at: int) -> int:
            if len(data) < 40:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return pwrite(fd, data[:-20], at)

        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(StreamaugError, match=r"cannot be written: No space left on device. No image is lost"):
            stream.take(8)
        monkeypatch.setattr(os, "pwrite", pwrite)
        got += listed(stream, [16])
    with make_stream(backend="local") as stream:
        assert listed(stream, [24]) == got
    assert delivered(path) == {0: 8, 1: 8, 2: 8}


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"stream.manifest to a path that can"):
        make_stream(manifest=tmp_path / "file" / "run.manifest", backend="local")


KILLED = """
import os, signal, sys
from streamaug.stream.rehearsal import images_of, make_stream
with make_stream(manifest=sys.argv[1], engine_options={"reject": 0.3}) as stream:
    for step in range(9):
        for image in images_of(stream.take(5)):
            print(image[0], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_after_a_kill_of_the_trainer_all_that_was_delivered_is_in_the_manifest(tmp_path):
    path = tmp_path / "run.manifest"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(path)], capture_output=True, text=True, timeout=100, cwd=root
    )
    ids = [int(line) for line in done.stdout.split()]
    assert done.returncode == -9, done.stderr
    assert len(ids) == 45
    with Manifest(path) as found:
        kept = []
        for batch in found.batches.values():
            order, reasons = found.contents(batch)
            kept += order.images["id"][reasons == 0].tolist()
    assert kept[:45] == ids
    assert len(kept) < 45 + 8

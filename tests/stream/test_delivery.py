import copy
import json
import os
import pickle
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from streamaug.errors import EverythingRejected, StreamaugError, UsageError
from streamaug.stream.batch import Recent, SynthBatch

from .fakes import (
    CLASSES,
    IMAGE_SHAPE,
    at_some_pace,
    digest_of,
    images_of,
    listed,
    make_planner,
    make_stream,
    pixels_of,
    producers_of,
    undisturbed,
    until,
)
from .holding import Hold

TAKES = [5, 8, 1, 20, 3, 40, 7]


@pytest.mark.parametrize("producers", [1, 2, 3])
def test_any_number_of_producers_delivers_the_same_images_in_the_same_order(producers):
    with make_stream(producers=producers, engine_options={"reject": 0.3}) as stream:
        assert listed(stream, TAKES) == undisturbed(TAKES, engine_options={"reject": 0.3})


@pytest.mark.parametrize("in_flight", [1, 3, 8])
def test_any_window_delivers_whole_batches_in_order(in_flight):
    ids = [image[0] for image in undisturbed([100], in_flight=in_flight)]
    assert ids == list(range(100))


def test_how_images_are_taken_does_not_change_them():
    assert undisturbed([1] * 30) == undisturbed([30]) == undisturbed([7, 23])


def test_every_field_of_a_batch_comes_from_its_order():
    planner = make_planner(8)
    with make_stream(backend="local") as stream:
        batch = stream.take(16)
    for k in range(2):
        order = planner.batch(k, planner.uniform())
        part = batch[8 * k : 8 * k + 8]
        for name, field in (("ids", "id"), ("labels", "label"), ("label_b", "label_b"), ("rows", "row_a")):
            assert (getattr(part, name) == order.images[field]).all()
        assert (part.label_mix == order.images["label_mix"]).all()
        assert (part.starts == order.start).all()
        for image, made in zip(order.images, part.images, strict=True):
            assert (made == pixels_of(digest_of(image, order.start, b""), IMAGE_SHAPE)).all()
    assert batch.fresh.all()
    assert batch.images.flags.owndata and batch.images.flags.writeable


def test_ranks_share_the_batches_among_them():
    ids = []
    for rank in range(3):
        ids += [image[0] for image in undisturbed([16], rank=rank, world_size=3)]
    assert sorted(ids) == list(range(48))
    assert ids[:9] == [*range(8), 24]


def test_without_order_the_fast_producer_is_not_held_up():
    with make_stream(in_order=False, producers=2, engine_options={"seconds": 0.02}) as stream:
        images = listed(stream, [160])
    expected = {image[0]: image for image in undisturbed([320])}
    assert len({image[0] for image in images}) == 160
    assert all(expected[image[0]] == image for image in images)


def test_no_images_are_an_empty_batch():
    with make_stream(backend="local") as stream:
        assert len(stream.take(0)) == 0
        assert len(stream.take(3)) == 3


# Starved.


def test_reuse_serves_recent_images_instead_of_waiting_and_counts_them(tmp_path):
    hold = Hold(tmp_path, 2)
    with make_stream(engine=hold.engine, engine_options=hold.options, starved="reuse", max_reuse=3) as stream:
        first = stream.take(16)
        stalls = stream.stats().stalls
        again = stream.take(48)
        stats = stream.stats()
        assert stats.stalls == stalls
        assert not again.fresh.any() and first.fresh.all()
        assert sorted(again.ids) == sorted(list(first.ids) * 3)
        assert {image[:2] for image in images_of(again)} == {image[:2] for image in images_of(first)}
        assert (stats.delivered, stats.reused, stats.fresh_share, stats.mean_reuse) == (64, 48, 0.25, 4.0)
        go_on = threading.Timer(0.1, hold.end)
        go_on.start()
        after = stream.take(8)  # every image has been served max_reuse times: now it waits
        assert after.fresh.all() and after.ids.min() == 16
        go_on.join()


def test_recent_images_are_served_least_used_and_newest_first():
    recent = Recent(np.empty((4, 1, 1, 1), np.uint8), max_reuse=2)
    batch = SynthBatch.around(np.empty((6, 1, 1, 1), np.uint8))
    batch.ids[:] = np.arange(6)
    recent.add(batch)
    out = SynthBatch.around(np.empty((10, 1, 1, 1), np.uint8))
    assert recent.serve(out, 0, 3) == 3
    assert list(out.ids[:3]) == [5, 4, 3]
    assert recent.serve(out, 0, 10) == 4
    assert list(out.ids[:4]) == [2, 5, 4, 3]
    assert recent.serve(out, 0, 10) == 1
    assert out.ids[0] == 2
    assert recent.serve(out, 0, 10) == 0


@pytest.mark.parametrize("held", [0, 2])
def test_real_returns_what_is_there_and_never_waits(held, tmp_path):
    hold = Hold(tmp_path, held)
    with make_stream(engine=hold.engine, engine_options=hold.options, starved="real") as stream:
        stream.take(0)
        hold.await_begin()
        assert len(stream.take(100)) == 8 * held
        stats = stream.stats()
        assert (stats.delivered, stats.reused, stats.fresh_share, stats.stalls) == (8 * held, 0, 1.0, 0)
        hold.end()
        until(lambda: stream.stats().ring_fill >= 0.25)
        got = len(stream.take(100))
        assert got >= 8 and got % 8 == 0


# Rejections.


def test_rejections_are_counted_by_class_and_reason():
    with make_stream(backend="local", engine_options={"reject": 0.4}) as stream:
        stream.take(200)
        stats = stream.stats()
    rejected = sum(n for reasons in stats.rejected.values() for n in reasons.values())
    assert set(stats.rejected) == {"0", "1", "2", "3"}
    assert set(stats.rejected["0"]) == {"non_finite", "no_contrast"}
    assert stats.accepted + rejected == stats.made
    assert stats.acceptance == pytest.approx(stats.accepted / stats.made)
    assert stats.delivered == 200 == sum(stats.delivered_per_class.values())


def test_a_class_that_is_often_rejected_is_ordered_more():
    with make_stream(backend="local", batch_size=32, engine_options={"reject_label": 2}) as stream:
        before = (stream.planner.batch(0, stream.planner.uniform()).images["label"] == 2).sum()
        stream.take(2000)
        asked = stream.stats().made
        share = stream.stats().rejected["2"]
    assert before == 8
    assert sum(share.values()) / asked > 0.4


def test_nothing_accepted_is_an_error_with_acceptance_by_class_and_reason():
    with make_stream(max_empty=5, engine_options={"reject": 1.1}) as stream:
        with pytest.raises(EverythingRejected) as error:
            stream.take(1)
        assert stream.stats().made == 40
    message = str(error.value)
    assert "5 batches in a row" in message
    assert "0 of 10 accepted (non_finite" in message


# Replan.


def test_replan_switches_at_once_and_drops_what_was_in_flight():
    rows = np.zeros(12)
    rows[4:8] = 1
    with make_stream(engine_options={"seconds": 0.05}) as stream:
        stream.take(12)
        stream.replan(row_weights=rows, first_k=1000)
        batch = stream.take(40)
        stats = stream.stats()
    assert batch.ids.min() == 8000 and list(batch.ids) == sorted(batch.ids)
    assert set(batch.rows) <= {4, 5, 6, 7}
    assert stats.dropped >= 4 and stats.delivered == 52


def test_one_producer_serves_several_plans_as_separate_streams_would():
    weights = np.array([1.0, 0, 0, 3.0])
    with make_stream() as stream:
        listed(stream, [30])
        stream.replan(class_weights=weights, first_k=500)
        mixed = listed(stream, [30])
    with make_stream(producers=2) as stream:
        stream.replan(class_weights=weights, first_k=500)
        assert listed(stream, [30]) == mixed
    assert {image[1] for image in mixed} == {0, 3}


def test_a_replan_does_not_wait_for_long_batches(tmp_path):
    hold = Hold(tmp_path, 2)
    with make_stream(engine=hold.engine, engine_options=hold.options) as stream:
        stream.take(1)
        hold.await_begin()
        stream.replan(first_k=100)
        assert stream.take(1).ids[0] == 800, "although the one in work would never have ended"
        assert stream.stats().made == 24


def test_replan_without_a_first_batch_goes_on_after_the_last_one_planned():
    with make_stream(backend="local", in_flight=4) as stream:
        stream.take(8)
        stream.replan()
        assert stream.take(1).ids[0] == 4 * 8


@pytest.mark.parametrize("first_k", [-5, 2.5, "a", float("nan")])
def test_a_replan_to_what_is_no_batch_is_refused_and_the_same_images_follow(first_k):
    with make_stream(producers=2) as stream:
        got = listed(stream, [13])
        with pytest.raises(UsageError, match=f"first_k is the number of a batch, from 0, got {first_k!r}"):
            stream.replan(first_k=first_k)
        assert got + listed(stream, [40]) == undisturbed([53])


# Figures.


def test_figures_add_up_and_are_plain():
    def check(pace: float) -> None:
        seconds = 0.02 * pace
        with make_stream(engine_options={"seconds": seconds}) as stream:
            assert stream.stats().time_to_first_batch_seconds is None and stream.rate is None
            for _ in range(5):
                stream.take(8)
            stats, rate = stream.stats(), stream.rate
            assert stream.sustainable(0.5) == pytest.approx(2 * rate)
        assert 8 / (5 * seconds) < rate < 8 / seconds
        assert 0 < stats.time_to_first_batch_seconds < 100
        assert stats.stages["sample"].seconds == pytest.approx(seconds * stats.made / 8, rel=0.01)
        assert 0.5 < stats.busy_share <= 1
        assert stats.stall_seconds > 2.5 * seconds and stats.wait_p99_seconds >= stats.wait_p50_seconds
        assert "the producer limits training: sample takes" in stats.limit
        assert [k for *_, k, _ in stats.timeline] == list(range(5))
        assert all(0 < began < ended for began, ended, _, _ in stats.timeline)
        json.dumps(stats.as_dict())

    at_some_pace(check)


def test_a_slow_trainer_is_named_as_the_limit():
    def check(pace: float) -> None:
        with make_stream(backend="local") as stream:
            for _ in range(10):
                stream.take(8)
                time.sleep(0.02 * pace)
            assert stream.stats().limit.startswith("training limits")
            assert stream.stats().ring_fill >= 0.5

    at_some_pace(check)


# Misuse.


def test_what_cannot_work_is_refused_at_construction():
    with pytest.raises(UsageError, match="rank 2 of world_size 2"):
        make_stream(rank=2, world_size=2)
    with pytest.raises(UsageError, match="engine_options must be JSON"):
        make_stream(engine_options={"path": Path("x")})


@pytest.mark.parametrize("n", [-1, 2.5, "8", None])
def test_what_is_no_number_of_images_is_refused_and_nothing_happened(n):
    with make_stream(backend="local") as stream:
        with pytest.raises(UsageError, match=f"n is a number of images from 0, got {n!r}"):
            stream.take(n)
        assert listed(stream, [3]) == undisturbed([3])


@pytest.mark.filterwarnings("error")  # that a sum overflows, say
def test_numbers_of_images_may_be_numpys_of_any_width():
    with make_stream(backend="local") as stream:
        got = [image for dtype in (np.uint8, np.int64) for _ in range(3) for image in listed(stream, [dtype(100)])]
        assert got == undisturbed([600])
        assert stream.stats().delivered == 600


def test_a_batch_that_lost_images_since_it_was_delivered_from_is_an_error_each_time():
    with make_stream(backend="local") as stream:
        stream.take(6)
        state = stream.state_dict()
    with make_stream(backend="local", engine_options={"reject": 0.6}) as stream:
        stream.load_state_dict(state)
        for _ in range(2):
            with pytest.raises(StreamaugError, match="batch 0 was made again with 3 accepted images, but 6 had been"):
                stream.take(1)


def test_a_closed_stream_says_so():
    stream = make_stream(backend="local")
    stream.take(1)
    stream.close()
    stream.close()
    with pytest.raises(StreamaugError, match="was closed"):
        stream.take(1)
    assert stream.producer_pids == [] and stream.stats().delivered == 1


def test_close_from_another_thread_ends_a_waiting_take():
    stream = make_stream(engine_options={"seconds": 60})
    closer = threading.Timer(0.6, stream.close)
    closer.start()
    began = time.monotonic()
    with pytest.raises(StreamaugError, match="was closed"):
        stream.take(1)
    assert time.monotonic() - began < 20
    closer.join()


def test_an_engine_of_another_shape_is_refused():
    with (
        make_stream(engine_options={"image_shape": [3, 4, 4]}) as stream,
        pytest.raises(StreamaugError, match=r"makes images of shape \(3, 4, 4\).*\(1, 8, 8\)"),
    ):
        stream.take(1)


def test_classes_have_names_in_the_figures():
    with make_stream(backend="local") as stream:
        stream.take(8)
        assert set(stream.stats().acceptance_per_class) == {str(label) for label in range(CLASSES)}


def test_producers_are_processes_of_their_own():
    with make_stream(producers=2, nice=3) as stream:
        stream.take(16)
        pids = producers_of(stream, 2)
        assert len(set(pids)) == 2 and os.getpid() not in pids
        nice = min(os.getpriority(os.PRIO_PROCESS, 0) + 3, 19)
        assert all(os.getpriority(os.PRIO_PROCESS, pid) == nice for pid in pids)
        environment = Path(f"/proc/{pids[0]}/environ").read_bytes().split(b"\0")
        assert b"OMP_NUM_THREADS=1" in environment


def test_feedback_from_another_thread_waits_for_the_call_in_progress():
    taken: list[int] = []
    with make_stream(backend="local", engine_options={"seconds": 0.002}) as stream:

        def read_ahead() -> None:
            for _ in range(30):
                taken.extend(stream.take(13).ids.tolist())

        reader = threading.Thread(target=read_ahead, daemon=True)
        reader.start()
        deadline = time.monotonic() + 100
        while reader.is_alive() and time.monotonic() < deadline:
            stream.feedback([0, 1, 2, 3], [1.0, 2.0, 3.0, 1.0])
            time.sleep(0.001)
        assert not reader.is_alive()
    assert len(taken) == len(set(taken)) == 30 * 13


def test_a_child_forked_while_another_thread_is_in_take_is_refused_the_state_instead_of_waiting_for_it(tmp_path):
    hold = Hold(tmp_path, 2)
    with make_stream(backend="local", engine=hold.engine, engine_options=hold.options) as stream:
        stream.take(1)
        reader = threading.Thread(target=stream.take, args=(40,))
        reader.start()
        until(stream._in_take.locked)
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            try:
                stream.state_dict()
            except StreamaugError:
                os._exit(0)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        hold.end()
        reader.join()


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_stream_that_is_copied_or_pickled_says_why_not(copied):
    with make_stream() as stream, pytest.raises(StreamaugError, match=r"cannot be copied or pickled.*make it where"):
        copied(stream)

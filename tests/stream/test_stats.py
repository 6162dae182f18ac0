"""The figures of a stream: what they count, what they call the limit, and what they cost."""

import itertools
import json
import re
import statistics
import time

import numpy as np
import pytest

from streamaug.stream.rates.recorder import Recorder
from streamaug.stream.ring import STAGES

from .fakes import at_some_pace, listed, make_planner, make_stream, until


class FakeSlot:
    """As much of a published slot as counting looks at."""

    abandoned = False

    def __init__(self, size: int, began_ns: int, ended_ns: int, rejected: int = 0):
        self.reasons = np.zeros(size, np.uint8)
        self.reasons[:rejected] = 1
        self.count = size - rejected
        self.span_ns = began_ns, ended_ns
        self.stage_ns = np.array([1, 6, 2, 1, 0]) * (ended_ns - began_ns) // 10


def recorded(batches: int, producers: int = 1, waits: float = 0.0, size: int = 64) -> Recorder:
    """Batches of 20 ms that were made one after the other, each delivered by a call of take of its own."""
    recorder, planner = Recorder(["cat", "dog", "fox", "owl"], producers), make_planner(size)
    recorder.started()
    weights = planner.uniform()
    for k in range(batches):
        recorder.planned(size, 50_000)
        order, slot = planner.batch(k, weights), FakeSlot(size, 20_000_000 * k, 20_000_000 * (k + 1), k % 4)
        recorder.arrived(order, slot)
        recorder.delivered(
            order.images["label"][slot.reasons == 0],
            made_ns=slot.span_ns[1],
            planned_at=max(k - 3, 0),
            began_ns=slot.span_ns[1] + 5_000_000,
            ended_ns=slot.span_ns[1] + 5_100_000,
        )
        recorder.took(size, 0.02 * k, 0.02 * k + waits + 0.0001, waits, (0.5, 0.25))
    return recorder


def test_every_stage_has_its_seconds_rate_busy_share_and_queue():
    stats = recorded(100, producers=2).stats(0.5, 0)
    assert list(stats.stages) == ["plan", *STAGES, "collect"]
    assert stats.stages["sample"].seconds == pytest.approx(1.2)
    assert stats.stages["sample"].images_per_second == pytest.approx(6400 / 1.2)
    assert stats.stages["sample"].busy_share == pytest.approx(0.3)  # of two producers' time
    assert stats.stages["emit"].images_per_second == 0
    assert stats.stages["plan"].seconds == pytest.approx(0.005)
    assert stats.stages["collect"].seconds == pytest.approx(0.01)
    assert stats.stages["collect"].images_per_second == pytest.approx(stats.delivered / 0.01)
    queues = {name: stage.queue_fill for name, stage in stats.stages.items() if stage.queue_fill is not None}
    assert queues == {"perturb": 0.5, "collect": 0.25}


def test_ages_are_in_steps_and_in_seconds():
    stats = recorded(100).stats(0.5, 0)
    assert stats.mean_age_steps == pytest.approx(3, abs=0.1)
    assert stats.mean_age_seconds == pytest.approx(0.005)


def test_waits_are_counted_and_have_a_median_and_a_tail():
    recorder = recorded(100)
    for seconds in [0.0] * 80 + [0.5] * 20:
        recorder.took(0, 2.0, 2.0 + seconds, seconds, (1.0, 0.0))
    stats = recorder.stats(0.5, 0)
    assert stats.stalls == 20 and stats.stall_seconds == pytest.approx(10)
    assert stats.wait_p50_seconds == 0 and stats.wait_p99_seconds == 0.5


def test_the_stage_that_limits_is_named_in_words_also_when_the_first_wait_was_long_ago():
    assert recorded(1).stats(0, 0).limit == "too early to say"
    waiting, busy = recorded(100, waits=0.01).stats(0, 0), recorded(100).stats(0, 0)
    assert waiting.limit == "the producer limits training: sample takes 60% of its time"
    assert busy.limit == "training limits: producers are busy 100% of the time"
    again = recorded(100)
    for _ in range(20):
        again.took(64, 9.0, 9.0, 0.0, (0.5, 0.5))  # and was given nothing new
    assert again.stats(0, 0).limit == "the producer limits training: sample takes 60% of its time"
    recorder = Recorder(["cat", "dog", "fox", "owl"], 1)
    recorder.took(0, 0.0, 1000.0, 1000.0, (1, 0))  # until the first batch was there
    order = make_planner(8).batch(0, make_planner(8).uniform())
    for k in range(5000):
        recorder.arrived(order, FakeSlot(8, 1000 * k, 1000 * k + 1000))
        recorder.took(0, 1000.0, 1000.0, 0.0, (0, 1))
    assert recorder.stats(1, 0).limit.startswith("training limits")


def test_a_judge_that_rejects_most_is_named_beside_the_stage():
    recorder, order = Recorder(["cat", "dog", "fox", "owl"], 1), make_planner(64).batch(0, make_planner(64).uniform())
    for k in range(100):
        recorder.arrived(order, FakeSlot(64, 20_000_000 * k, 20_000_000 * (k + 1), rejected=56))
        recorder.took(8, 0.02 * k, 0.02 * k + 0.01, 0.01, (1, 0))
    assert recorder.stats(0, 0).limit.endswith("sample takes 60% of its time; the judge rejects 88% of what is made")


@pytest.mark.parametrize(("in_flight", "limited"), [(2, True), (16, False)])
def test_a_loop_that_waits_for_more_at_once_than_is_in_flight_is_told_so(in_flight, limited):
    def check(pace: float) -> None:
        with make_stream(in_flight=in_flight, backend="local", engine_options={"seconds": 0.004 * pace}) as stream:
            stream.take(1)
            for _ in range(12):
                stream.take(48)  # six batches, made in 24 ms
                time.sleep(0.05 * pace)
            said = stream.stats().limit
        assert said.startswith("batches in flight limit training: producers could feed ") == limited, said
        assert said.endswith("more stream.in_flight evens that out") == limited

    at_some_pace(check)


def test_a_stage_of_the_trainers_own_that_takes_much_of_its_time_is_named():
    recorder = recorded(70)
    recorder.planned(64, 10**15)
    assert recorder.stats(0, 0).limit.endswith("of the time; plan takes 100% of the trainer's")


def test_the_timeline_keeps_the_latest_batches_in_order(monkeypatch):
    monkeypatch.setattr(Recorder, "TIMELINE", 16)
    for batches in (3, 16, 21, 40):
        timeline = recorded(batches).stats(0, 0).timeline
        assert [k for *_, k, _ in timeline] == list(range(max(batches - 16, 0), batches))


def test_counts_of_images_add_up_through_a_run_with_rejections_and_a_replan():
    with make_stream(engine_options={"reject": 0.3}) as stream:
        listed(stream, [5, 40, 3])
        stream.replan()
        listed(stream, [30])
        until(lambda: stream.stats().ring_fill > 0)
        stats = stream.stats()
    rejected = sum(n for reasons in stats.rejected.values() for n in reasons.values())
    assert stats.made == stats.accepted + rejected
    assert stats.delivered == 78 == sum(stats.delivered_per_class.values())
    assert stats.accepted >= stats.delivered + stats.dropped
    assert set(json.loads(json.dumps(stats.as_dict()))["stages"]["plan"]) == {
        "seconds", "images_per_second", "busy_share", "queue_fill",
    }  # fmt: skip


def test_images_are_as_many_steps_old_as_batches_are_ahead_of_them():
    with make_stream(in_flight=4, backend="local") as stream:
        for _ in range(50):
            stream.take(8)
        assert stream.stats().mean_age_steps == pytest.approx(3, abs=0.3)


def test_a_line_is_logged_now_and_then(monkeypatch, caplog):
    monkeypatch.setattr(Recorder, "REPORT_SECONDS", 0.2)
    caplog.set_level("INFO", logger="streamaug")

    def said() -> list:
        return [record for record in caplog.records if "images delivered" in record.getMessage()]

    with make_stream(engine_options={"seconds": 0.02, "reject": 0.2}) as stream:
        for _ in range(40):
            stream.take(8)
        until(lambda: len(stream.take(8)) > 0 and len(said()) >= 3)
    times = [record.created for record in said()]
    assert all(later - one > 0.15 for one, later in itertools.pairwise(times)), times
    lines = [record.getMessage() for record in said()]
    for word in (
        "fresh 100%",
        "could be fed",
        "reuse 1.00",
        "steps",
        "made",
        "rejected",
        "p99",
        "stalls",
        "busy: plan",
        "sample",
        "ring",
    ):
        assert word in lines[-1], word
    assert lines[-1].endswith("of its time") and "the producer limits training" in lines[-1]
    assert re.search(
        r"\d+ rejected \(\w+ \d+, \w+ \d+; most of class \w+ \(\d+\), \w+ \(\d+\), \w+ \(\d+\)\)", lines[-1]
    )
    assert re.search(r"busy: plan \d+% at [\d,]+/s, ", lines[-1])


def test_counting_costs_less_than_a_two_hundredth_of_a_step():
    """Against a batch of 64 images in 20 ms, which is as fast as a small denoiser makes them on one core."""
    recorder, planner = recorded(10), make_planner(64)
    order, slot = planner.batch(0, planner.uniform()), FakeSlot(64, 0, 20_000_000, 10)
    labels = order.images["label"][10:]
    seconds = []
    for _ in range(300):
        began = time.perf_counter()
        recorder.planned(64, 10)
        recorder.arrived(order, slot)
        recorder.delivered(labels, made_ns=0, planned_at=0, began_ns=1, ended_ns=2)
        recorder.made(slot, 10, first=False)
        recorder.took(64, 0.0, 0.001, 0.0, (0.5, 0.5))
        recorder.report_due()
        seconds.append(time.perf_counter() - began)
    assert statistics.median(seconds) < 0.005 * 0.02

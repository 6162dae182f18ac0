"""Supply and demand: measured before the first step, compared after a few, and said with what would help."""

import threading
import time

import numpy as np
import pytest

from streamaug.config import Config, LoaderConfig, StreamConfig
from streamaug.stream.plan import Plan
from streamaug.stream.ranks import trainers_here
from streamaug.stream.rates.advice import Generator, announcement, remedies, verdict
from streamaug.stream.rates.pace import Demand, Pace
from streamaug.stream.rates.recorder import Recorder
from streamaug.stream.ring import FAILED

from .fakes import at_some_pace, make_planner, make_stream, until
from .holding import Hold

SLOW = Pace(supply=240, demand=640, waiting=0.62, missing=0, ratio=0.5)


def demand_of(own: list[float], *, wanted: int = 32, fresh: int = 32, waited: float = 0.0) -> Demand:
    """Calls of take that last `waited` and have these seconds of the loop's own between them."""
    demand, now = Demand(), 0.0
    for seconds in [0.0, *own]:
        began = now + seconds
        now = began + waited
        demand.took(wanted, fresh, began, now, waited)
    return demand


# Measuring.


def test_demand_is_what_is_asked_for_in_the_loops_own_time_without_its_waits():
    assert demand_of([0.05] * 20).per_second == pytest.approx(640)
    assert demand_of([0.05] * 20, waited=0.3).per_second == pytest.approx(640)
    assert demand_of([0.05] * 7).per_second is None, "too few calls"


def test_a_rare_long_pause_such_as_an_evaluation_does_not_lower_the_demand():
    assert demand_of([0.05] * 30 + [60.0] + [0.05] * 30).per_second == pytest.approx(640)


def test_calls_that_come_in_bursts_ask_for_no_more_than_their_mean():
    assert demand_of([0.2, 0.0, 0.0, 0.0] * 16).per_second == pytest.approx(640, rel=0.35)


def test_a_loop_is_too_fast_when_it_waits_or_is_given_the_same_images_again():
    waits = demand_of([0.05] * 20, waited=0.1).pace(240, 0.5)
    again = demand_of([0.05] * 20, fresh=12).pace(240, 0.5)
    for pace in (waits, again):
        assert pace.too_slow and pace.fed == pytest.approx(0.375)
        assert pace.sustainable_ratio == pytest.approx(0.1875)
    assert waits.waiting == pytest.approx(2 / 3) and again.missing == pytest.approx(1 - 12 / 32)


def test_what_keeps_up_is_no_alarm():
    assert not demand_of([0.05] * 20).pace(640, 0.5).too_slow
    assert not demand_of([0.05] * 20).pace(240, 0.5).too_slow, "what is in the ring still lasts"
    assert not demand_of([0.05] * 20, waited=0.1).pace(900, 0.5).too_slow, "it waited for something else"
    assert demand_of([0.05] * 20).pace(900, 0.5).sustainable_ratio == 0.5
    assert demand_of([0.05] * 20).pace(900, None).sustainable_ratio is None


class FakeSlot:
    """As much of a published slot as its time is read from."""

    def __init__(self, seconds: float, sampling: float, count: int = 64):
        self.span_ns = 0, int(seconds * 1e9)
        self.stage_ns = np.array([0, int(sampling * 1e9), 0, 0, 0])
        self.count = count


def test_the_rate_leaves_out_first_batches_and_what_was_rejected():
    recorder = Recorder(["a"], producers=2)
    assert recorder.rate() is None
    recorder.made(FakeSlot(8.0, 8.0), 5, first=True)
    assert recorder.rate() == pytest.approx(2 * 64 / 8) and not recorder.is_warm
    for count in (64, 48):
        recorder.made(FakeSlot(0.5, 0.4, count), 5, first=False)
    assert recorder.rate() == pytest.approx(2 * 56 / 0.5) and recorder.is_warm


def test_the_first_rate_is_that_of_batches_of_mean_depth():
    """Two batches of 10 steps are no measure of a run whose batches take 4: only sampling is shorter there."""
    recorder = Recorder(["a"], producers=1)
    for _ in range(2):
        recorder.made(FakeSlot(1.2, 1.0), 10, first=False)
    assert recorder.rate(4) == pytest.approx(64 / 0.6)
    planner = make_planner(8)
    plan = Plan(planner, 4, rank=0, world_size=1, first_judge=None)
    depths = [10 - planner.batch(k, planner.uniform()).start for k in range(32)]
    assert plan.mean_evaluations() == np.mean(depths) and len(set(depths)) > 1


def test_a_thread_that_reads_ahead_is_no_loop_and_raises_no_alarm(caplog):
    def check(pace: float) -> None:
        nonlocal stats
        with make_stream(engine_options={"seconds": 0.03 * pace}) as stream:
            reader = threading.Thread(target=lambda: [stream.take(8) for _ in range(30)])
            reader.start()
            reader.join()
            stats = stream.stats()
        assert stats.stall_seconds > 0.5 * pace

    stats = None
    at_some_pace(check)
    assert caplog.records == []
    assert stats.demand_per_second is None and stats.sustainable_ratio is None


# Saying it.


def test_before_the_first_image_it_is_said_what_can_be_fed(caplog):
    caplog.set_level("INFO", logger="streamaug")

    def check(pace: float) -> None:
        caplog.clear()
        options = {"seconds": 0.02 * pace, "slow_every": 1000, "slow_seconds": 0.3 * pace}
        with make_stream(engine_options=options) as stream:
            stream.asked_ratio = 0.2
            stream.take(1)
            assert len(caplog.records) == 1
            line, rate = caplog.records[0].getMessage(), stream.rate
            stream.take(40)
        assert line.startswith("producer ready in ") and "the first batch" not in line
        assert 8 / 0.1 < rate * pace < 8 / 0.02, "the first batch took 0.32 s, the second one 0.02"
        assert "pass the judge: ratio 0.2 up to " in line and ", 0.5 up to " in line
        assert len(caplog.records) == 1, "once"

    at_some_pace(check)


@pytest.mark.parametrize("why", ["none was ordered", "it takes long", "it raises"])
def test_where_no_second_batch_comes_soon_the_first_one_counts_and_is_named(caplog, why, tmp_path):
    caplog.set_level("INFO", logger="streamaug")
    hold = Hold(tmp_path, 1)
    options = {"in_flight": 1 if why == "none was ordered" else 4, "engine_options": hold.options | {"raise_at": 1}}
    with make_stream(engine=hold.engine, **options) as stream:
        first_times = stream._dispatch.first_times

        def seen_to_have_begun() -> tuple[float, bool]:
            if why == "it raises":
                hold.end()
                until(lambda: stream._fleet.rings[0].state == FAILED)
            return first_times()

        stream._dispatch.first_times = seen_to_have_begun  # called once the first batch is there
        stream.take(8)
    assert caplog.records[0].getMessage().count("at least") == 1
    assert "(the first batch warmed it up)" in caplog.records[0].getMessage()


def test_a_loop_that_real_images_fill_up_is_not_made_to_wait_for_the_rate(caplog, tmp_path):
    caplog.set_level("INFO", logger="streamaug")
    hold = Hold(tmp_path, 0)
    with make_stream(starved="real", engine=hold.engine, engine_options=hold.options) as stream:
        assert len(stream.take(8)) == 0, "and it never would have ended"
        assert not caplog.records
        hold.end()
        until(lambda: len(stream.take(8)) >= 0 and len(caplog.records) > 0)
    assert caplog.records[0].getMessage().startswith("producer ready")


def test_a_generator_that_is_too_slow_is_said_once_with_figures_and_what_would_help(caplog):
    def check(pace: float) -> None:
        caplog.clear()
        with make_stream(engine_options={"seconds": 0.04 * pace}) as stream:
            stream.asked_ratio = 0.5
            for _ in range(40):
                stream.take(8)
                time.sleep(0.005 * pace)
            stats = stream.stats()
        assert len(caplog.records) == 1
        (record,) = caplog.records
        message = record.getMessage()
        assert record.levelname == "WARNING"
        assert message.startswith("the generator is too slow for ratio 0.5: training ")
        assert "synthetic images/s" in message and "stands still for " in message
        assert f"stream.starved: reuse with max_reuse: {int(np.ceil(0.5 / stats.sustainable_ratio - 1))}" in message
        assert 120 < stats.supply_per_second * pace < 200.1 and stats.demand_per_second * pace > 400
        assert stats.sustainable_ratio == pytest.approx(0.5 * stats.supply_per_second / stats.demand_per_second)
        assert (stats.asked_ratio, stats.as_dict()["sustainable_ratio"]) == (0.5, stats.sustainable_ratio)
        assert f"{stats.supply_per_second:,.0f}/s could be fed, {stats.demand_per_second:,.0f}/s used" in stats.line()

    at_some_pace(check)


def test_a_generator_that_keeps_up_is_not_complained_of(caplog):
    def check(pace: float) -> None:
        caplog.clear()
        with make_stream(engine_options={"seconds": 0.005 * pace}) as stream:
            for _ in range(40):
                stream.take(8)
                time.sleep(0.02 * pace)
            stats = stream.stats()
        assert caplog.records == []
        assert stats.supply_per_second > stats.demand_per_second and stats.sustainable_ratio == stats.asked_ratio

    at_some_pace(check)


def test_the_ratio_is_the_configurations_until_a_loader_says_its_own():
    from streamaug.stream import Stream

    def stream_of(loader_config: LoaderConfig | None) -> Stream:
        return Stream(
            make_planner(8),
            engine="streamaug.stream.hashing:build",
            engine_options={"image_shape": [1, 8, 8]},
            image_shape=(1, 8, 8),
            config=StreamConfig(batch_size=8),
            loader_config=loader_config,
        )

    assert stream_of(None).asked_ratio is None
    assert stream_of(LoaderConfig(ratio=0.25)).stats().asked_ratio == 0.25


# What would help.


def generator_of(
    *,
    cores: int = 8,
    trainers: int = 1,
    sharers: int = 1,
    sampling: float = 0.96,
    acceptance: float = 0.9,
    compiled: bool = True,
    **changes: object,
) -> Generator:
    values: dict = {"prior": {}, "recipes": [{"kind": "noise", "depth": [0.2, 0.6]}]} | changes
    config = Config.model_validate(values)
    options = {"config": config.model_dump(mode="json"), "execution": {"compile": compiled}}
    return Generator.of(
        options,
        config.stream,
        sampling=sampling,
        acceptance=acceptance,
        on_cpu=True,
        cores=cores,
        trainers=trainers,
        sharers=sharers,
    )


def line_of(generator: Generator, setting: str, pace: Pace = SLOW) -> str | None:
    return next((line for line in remedies(pace, generator) if line.startswith(f"{setting}:")), None)


def test_the_ratio_that_is_fed_is_named_and_never_rounded_up():
    assert line_of(generator_of(), "loader.ratio") == "loader.ratio: 0.18 (0.5 now) needs no more than is made"
    slower = Pace(supply=1, demand=640, waiting=0.9, missing=0, ratio=0.5)
    assert line_of(generator_of(), "loader.ratio", slower).startswith("loader.ratio: 0.00078 ")
    unsaid = Pace(supply=240, demand=640, waiting=0.6, missing=0, ratio=None)
    assert line_of(generator_of(), "loader.ratio", unsaid) is None
    assert "At full training speed 0.38 times the synthetic share is sustainable" in verdict(unsaid, generator_of())


def test_fewer_steps_and_less_depth_come_with_the_rate_that_they_give():
    steps = line_of(generator_of(), "model.steps")
    assert steps == "model.steps: 6 (20 now) gives about 732 images/s, by 70% fewer evaluations"
    depth = line_of(generator_of(), "recipes.depth")
    assert depth.startswith("recipes.depth: up to 0.21 (0.6 now) gives about 452 images/s, by 49% fewer evaluations")
    assert line_of(generator_of(model={"steps": 4}), "model.steps") is None, "no solver makes much of fewer"
    assert line_of(generator_of(recipes=[{"kind": "prompt"}]), "recipes.depth") is None, "it begins at pure noise"


def test_guidance_is_named_where_it_is_on_and_wide():
    def guided(interval: list[float], depth: list[float], scale: float = 3.0) -> str | None:
        recipe = {"kind": "noise", "depth": depth, "guidance": [1, scale]}
        generator = generator_of(model={"guidance_interval": interval}, recipes=[recipe])
        return line_of(generator, "model.guidance_interval")

    everywhere = guided([0, 1], [1, 1])
    assert everywhere.startswith("model.guidance_interval: [0.25, 0.75] ([0, 1] now) gives about 316 images/s, by 25%")
    assert guided([0, 1], [0.5, 0.5]).endswith("by 25% fewer evaluations: guidance evaluates the network twice")
    assert guided([0, 1], [1, 1], scale=1.0) is None
    assert guided([0.4, 0.6], [1, 1]) is None


def test_idle_cores_compiling_and_reuse_are_named_where_they_are_to_be_had():
    assert line_of(generator_of(), "stream.producers") == (
        "stream.producers: 3 (1 now) gives up to 720 images/s: 6 cores are idle"
    )
    assert line_of(generator_of(cores=2), "stream.producers") is None
    assert line_of(generator_of(compiled=True), "model.compile") is None
    assert line_of(generator_of(compiled=False), "model.compile").startswith("model.compile: true (off now")
    reuse = line_of(generator_of(), "stream.starved")
    assert reuse == "stream.starved: reuse with max_reuse: 2 serves an image 2.7 times on average instead of waiting"
    assert line_of(generator_of(stream={"starved": "reuse"}), "stream.starved") is None
    assert line_of(generator_of(stream={"starved": "reuse"}), "stream.max_reuse") is None, "4 is enough"
    more = line_of(generator_of(stream={"starved": "reuse", "max_reuse": 1}), "stream.max_reuse")
    assert more == "stream.max_reuse: 2 (1 now) serves an image 2.7 times on average and waits no more"


def test_cores_that_other_ranks_use_are_not_idle():
    assert line_of(generator_of(trainers=2), "stream.producers") == (
        "stream.producers: 3 (1 now) gives up to 720 images/s: 4 cores are idle"
    )
    assert line_of(generator_of(trainers=3), "stream.producers") is None, "2 of 8 are idle, the ranks would need 3"
    assert line_of(generator_of(trainers=4), "stream.producers") is None
    assert line_of(generator_of(cores=4, trainers=2, sharers=2), "stream.producers").endswith("a core is idle")


def test_producers_of_each_ranks_own_are_named_where_cores_are_idle_for_them():
    assert line_of(generator_of(cores=16, trainers=4, sharers=4), "stream.shared") == (
        "stream.shared: false (true now) gives each rank producers of its own, and with them up to 960 images/s: "
        "11 cores are idle"
    )
    assert line_of(generator_of(cores=7, trainers=4, sharers=4), "stream.shared") is None
    assert line_of(generator_of(trainers=2), "stream.shared") is None


@pytest.mark.parametrize(("told", "here"), [("2", 2), ("", 8), ("many", 8), ("0", 8), ("16", 8)])
def test_the_ranks_of_this_machine_are_as_many_as_torchrun_says(monkeypatch, told, here):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", told)
    assert trainers_here(8) == here


def test_a_judge_that_rejects_much_is_named():
    assert line_of(generator_of(acceptance=0.9), "recipes") is None
    assert line_of(generator_of(acceptance=0.3), "recipes").startswith(
        "recipes: the judge lets 30% of what is made pass, all of it would be 800 images/s"
    )


def test_an_engine_of_the_users_own_gets_the_advice_that_needs_no_model():
    generator = Generator.of({"size": 3}, StreamConfig(), sampling=1.0, acceptance=1.0, on_cpu=True, cores=2)
    assert [line.partition(":")[0] for line in remedies(SLOW, generator)] == ["loader.ratio", "stream.starved"]


@pytest.mark.parametrize(
    ("starved", "words"),
    [
        ("wait", "so training stands still for 62% of its time"),
        ("reuse", "so an image is used 2.7 times on average"),
        ("real", "so 60% of what was asked for was left to real images"),
    ],
)
def test_the_consequence_is_the_one_of_the_policy(starved, words):
    pace = SLOW if starved == "wait" else Pace(supply=240, demand=640, waiting=0, missing=0.6, ratio=0.5)
    text = verdict(pace, generator_of(stream={"starved": starved}))
    first, *lines = text.splitlines()
    assert "training could use 640 synthetic images/s, 240 are made that pass the judge" in first and words in first
    assert "ratio 0.18 is sustainable. What would help in this run:" in first
    assert all(line.startswith("  - ") for line in lines) and len(lines) >= 4


def test_the_announcement_without_a_ratio_names_usual_ones():
    text = announcement(3.14, 240, None, warm=True)
    assert text == (
        "producer ready in 3.1 s; 240 images/s pass the judge: ratio 0.5 up to 480, 0.25 up to 960, 0.1 up to 2,400 "
        "training images/s"
    )

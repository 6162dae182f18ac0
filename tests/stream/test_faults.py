"""Real processes, real signals. Deadlines are asserted with slack; what they promise is in the README."""

import os
import signal
import time

import numpy as np
import pytest

from streamaug.errors import ModelError, ProducerError

from .fakes import (
    assert_within,
    at_some_pace,
    images_of,
    listed,
    make_stream,
    producers_of,
    running,
    undisturbed,
    until,
)
from .holding import Hold

POINTS = ["before_ready", "before_order", "mid_write", "after_make", "before_publish", "after_publish"]


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_this_point_it_delivers_the_same_images(point, monkeypatch):
    monkeypatch.setenv("STREAMAUG_FAULT", f"{point}:{0 if point == 'before_ready' else 3}")
    with make_stream(engine_options={"reject": 0.2}) as stream:
        images = listed(stream, [50])
        assert stream.stats().restarts == 1
    assert images == undisturbed([50], engine_options={"reject": 0.2})


def test_one_of_several_killed_in_the_middle_of_writing_delivers_the_same_images(monkeypatch):
    monkeypatch.setenv("STREAMAUG_FAULT", "mid_write:1")
    judge = np.arange(16, dtype=np.uint8)
    with make_stream(producers=2, judge=judge) as stream:
        images = listed(stream, [50])
        assert stream.stats().restarts == 2
    assert images == undisturbed([50], judge=judge)


def test_five_kills_at_random_moments_deliver_the_same_images():
    rng = np.random.default_rng(5)
    images = []
    with make_stream(producers=2, engine_options={"seconds": 0.01, "reject": 0.2}) as stream:
        for kills in range(5):
            for _ in range(8):  # of which some are made since the last kill, by either
                images += images_of(stream.take(10))
            time.sleep(rng.uniform(0, 0.02))
            os.kill(rng.choice(producers_of(stream, 2)), signal.SIGKILL)
            images += images_of(stream.take(10))
            until(lambda kills=kills: stream.stats().restarts == kills + 1)
    assert images == undisturbed([len(images)], engine_options={"reject": 0.2})


def test_a_death_is_noticed_within_a_second_also_while_the_trainer_is_busy_elsewhere():
    with make_stream() as stream:
        stream.take(8)

        def notice() -> float:
            (pid,) = producers_of(stream)
            os.kill(pid, signal.SIGKILL)
            deaths.append(pid)
            return until(lambda: stream.producer_pids not in ([], [pid]))

        deaths: list[int] = []
        assert_within(1, notice)
        assert stream.stats().restarts == len(deaths)
        assert images_of(stream.take(40)) == undisturbed([8, 40])[8:]


def test_a_terminated_producer_is_replaced_like_a_killed_one():
    with make_stream() as stream:
        stream.take(8)
        os.kill(*producers_of(stream), signal.SIGTERM)
        assert images_of(stream.take(40)) == undisturbed([8, 40])[8:]
        assert stream.stats().restarts == 1


def test_ctrl_c_in_the_terminal_does_not_reach_the_producer():
    with make_stream() as stream:
        stream.take(8)
        (pid,) = producers_of(stream)
        assert os.getpgid(pid) != os.getpgid(0) and os.getsid(pid) != os.getsid(0)
        os.kill(pid, signal.SIGINT)
        stream.take(20)
        assert stream.producer_pids == [pid]


# Exceptions.


def test_an_exception_arrives_within_a_second_with_its_traceback_and_its_batch(tmp_path):
    messages = []

    def arrive() -> float:
        raised = tmp_path / f"raised {len(messages)}"
        with make_stream(engine_options={"raise_at": 5, "seconds": 0.01, "once": str(raised)}) as stream:
            stream.take(1)
            with pytest.raises(ProducerError) as error:
                listed(stream, [1] * 100)
            took = time.time() - raised.stat().st_mtime
            with pytest.raises(ProducerError):
                stream.take(1)
        messages.append(str(error.value))
        return took

    assert_within(1, arrive)
    message = messages[0]
    assert message.startswith("the producer raised RuntimeError in batch 5: the weights are rotten")
    assert "in make" in message and "hashing.py" in message and "Traceback" in message


def test_a_producer_out_of_memory_is_an_exception_with_its_batch():
    with (
        make_stream(engine_options={"allocate_at": 2}) as stream,
        pytest.raises(ProducerError, match=r"raised _?\w*MemoryError in batch 2: Unable to allocate 1\.00 EiB"),
    ):
        stream.take(100)


@pytest.mark.parametrize("backend", ["local", "process"])
def test_a_refusal_keeps_its_class_and_its_message(backend):
    with (
        make_stream(backend=backend, engine_options={"refuse": "NaN in the weights"}) as stream,
        pytest.raises(ModelError) as error,
    ):
        stream.take(1)
    assert str(error.value) == "NaN in the weights"
    assert "Raised by the producer while starting" in error.value.__notes__[0]


def test_an_engine_that_cannot_be_found_is_an_exception_like_any_other():
    stream = make_stream()
    object.__setattr__(stream._fleet.work, "engine", "no.such:module")
    with (
        stream,
        pytest.raises(ProducerError, match=r"ModuleNotFoundError while starting: No module named 'no'"),
    ):
        stream.take(1)


def test_an_exception_in_a_thread_arrives_as_well():
    with (
        make_stream(backend="local", engine_options={"raise_at": 0}) as stream,
        pytest.raises(ProducerError, match="in batch 0: the weights are rotten"),
    ):
        stream.take(1)


def test_a_wrong_count_is_an_error_of_the_engine():
    with (
        make_stream(engine_options={"miscount": True}) as stream,
        pytest.raises(ProducerError, match="of 8 orders the engine accepted 9 and gave 0 a reason"),
    ):
        stream.take(1)


# Deaths.


@pytest.mark.parametrize("max_restarts", [0, 2])
def test_dying_again_and_again_without_progress_is_an_error_with_the_last_words(max_restarts):
    with make_stream(max_restarts=max_restarts, engine_options={"exit_at": 2}) as stream:
        with pytest.raises(ProducerError) as error:
            stream.take(100)
        assert stream.stats().restarts == max_restarts
    message = str(error.value)
    assert f"died {max_restarts + 1} times in a row" in message
    assert f"stream.max_restarts: {max_restarts}" in message
    assert "exited with code 3" in message and "what I last wanted to say" in message


def test_a_producer_that_cannot_even_start_is_an_error():
    with (
        make_stream(max_restarts=1, engine_options={"die_at_start": True}) as stream,
        pytest.raises(ProducerError, match="died 2 times in a row"),
    ):
        stream.take(1)


def test_deaths_with_progress_in_between_do_not_add_up():
    with make_stream(max_restarts=1) as stream:
        for _ in range(4):
            stream.take(40)
            pids = producers_of(stream)
            os.kill(pids[0], signal.SIGKILL)
            until(lambda pids=pids: stream.producer_pids not in ([], pids))
        stream.take(40)
        assert stream.stats().restarts == 4


# Hangs.


def test_a_stopped_producer_is_reported_and_then_replaced(tmp_path, caplog):
    stopped = tmp_path / "stopped"
    options = {"stop_at": 5, "once": str(stopped)}
    with make_stream(stall_timeout=0.4, hang_timeout=1.0, engine_options=options) as stream:
        images = listed(stream, [80])
        assert stream.stats().restarts == 1
    assert images == undisturbed([80])
    at = stopped.stat().st_mtime
    said = [(record.getMessage(), record.created - at) for record in caplog.records if record.created > at]
    reported = min(seconds for line, seconds in said if "has made no progress for" in line)
    (replaced,) = [seconds for line, seconds in said if "replacing it" in line]
    assert 0.3 < reported < 5 * 0.4 and 0.9 < replaced < 5 * 1.0


def test_slow_work_is_not_a_hang_as_long_as_it_beats(caplog):
    def check(pace: float) -> None:
        caplog.clear()
        limits = {"stall_timeout": 0.2 * pace, "hang_timeout": 0.4 * pace}
        with make_stream(**limits, engine_options={"seconds": 0.8 * pace}) as stream:
            stream.take(16)
            assert stream.stats().restarts == 0
        assert "progress" not in caplog.text

    at_some_pace(check)


def test_the_first_batch_may_take_as_long_as_starting():
    def check(pace: float) -> None:
        limits = {"stall_timeout": 0.2 * pace, "hang_timeout": 0.4 * pace, "start_timeout": 100}
        options = {"slow_every": 1000, "slow_seconds": 0.8 * pace, "beat": False}
        with make_stream(**limits, engine_options=options) as stream:
            stream.take(8)
            assert stream.stats().restarts == 0

    at_some_pace(check)


def test_an_idle_producer_does_not_count_as_hung():
    def check(pace: float) -> None:
        with make_stream(stall_timeout=0.1 * pace, hang_timeout=0.3 * pace) as stream:
            stream.take(4)
            time.sleep(1 * pace)
            stream.take(40)
            assert stream.stats().restarts == 0

    at_some_pace(check)


def test_a_producer_that_is_never_ready_is_an_error():
    with make_stream(start_timeout=0.8, engine_options={"start_seconds": 60}) as stream:
        began = time.monotonic()
        with pytest.raises(ProducerError, match=r"not ready after 0.8 s \(stream.start_timeout\)"):
            stream.take(1)
        assert time.monotonic() - began < 30


def test_a_hung_thread_is_an_error_because_it_cannot_be_replaced(tmp_path):
    hold = Hold(tmp_path, 2)
    options = {"engine": hold.engine, "engine_options": hold.options | {"beat": False}}
    with make_stream(backend="local", stall_timeout=0.1, hang_timeout=0.3, **options) as stream:
        with pytest.raises(ProducerError, match=r"only stream\.backend: process can replace"):
            stream.take(100)
        hold.end()


def test_what_a_producer_logs_is_logged_by_the_trainer(caplog):
    caplog.set_level("DEBUG", logger="streamaug")
    with make_stream(engine_options={"say": "no fused path for this scheduler"}) as stream:
        stream.take(8)
        until(lambda: "no fused path" in caplog.text)
    (record,) = [record for record in caplog.records if "no fused path" in record.getMessage()]
    assert record.levelname == "WARNING"
    assert record.getMessage() == "producer: no fused path for this scheduler"


# Neighbours.


def test_two_streams_in_one_process_do_not_disturb_each_other():
    with make_stream(seed=1) as one, make_stream(seed=2, producers=2) as two:
        first, second = [], []
        for n in (3, 9, 20):
            first += images_of(one.take(n))
            second += images_of(two.take(n))
        os.kill(*producers_of(one), signal.SIGKILL)
        pids = producers_of(two, 2)
        first += images_of(one.take(30))
        one.close()
        second += images_of(two.take(30))
        assert two.producer_pids == pids and all(running(pid) for pid in pids)
    assert first == undisturbed([62], seed=1) and second == undisturbed([62], seed=2)

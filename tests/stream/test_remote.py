"""The interface for producers on other machines, through a double: orders go down a pipe, batches up."""

import os
import signal

import numpy as np
import pytest

from streamaug.errors import ProducerError
from streamaug.stream.footprint import footprint
from streamaug.stream.producers import fleet

from .fakes import assert_given_back, images_of, listed, make_stream, producers_of, undisturbed, until
from .far import PipeProducer
from .holding import Hold


@pytest.fixture(autouse=True)
def pipes(monkeypatch):
    monkeypatch.setitem(fleet._BACKENDS, "process", PipeProducer)
    before = footprint()
    yield
    assert_given_back(before)


@pytest.mark.parametrize("producers", [1, 3])
def test_through_a_pipe_come_the_same_images(producers):
    with make_stream(producers=producers, engine_options={"reject": 0.3}) as stream:
        assert listed(stream, [5, 8, 40, 30]) == undisturbed([83], engine_options={"reject": 0.3})
        stats = stream.stats()
    assert stats.restarts == 0 and stats.rejected


def test_what_changes_while_it_runs_changes_the_same_batches():
    def run(**options) -> list[tuple]:
        images = []
        with make_stream(judge=np.zeros(16, np.uint8), **options) as stream:
            for step in range(30):
                batch = stream.take(6)
                images += images_of(batch)
                stream.feedback(batch.labels, 1.0 + batch.labels * (step % 3))
                for times in range(step % 3):
                    stream.publish_judge(np.full(16, 3 * step + times, np.uint8))
        return images

    assert run(producers=2) == run(backend="local")


def test_a_far_end_that_dies_is_replaced_and_what_was_on_its_way_is_made_again():
    judge = np.arange(16, dtype=np.uint8)
    images = []
    with make_stream(judge=judge, engine_options={"seconds": 0.01}) as stream:
        for kills in range(3):
            images += listed(stream, [40])  # more than are in flight: some are of the one that is killed next
            os.kill(*producers_of(stream), signal.SIGKILL)
            until(lambda kills=kills: stream.stats().restarts == kills + 1)
        images += listed(stream, [40])
    assert images == undisturbed([160], judge=judge)


def test_an_exception_at_the_far_end_arrives_with_its_traceback():
    with make_stream(engine_options={"raise_at": 3}) as stream, pytest.raises(ProducerError) as error:
        listed(stream, [8] * 10)
    assert str(error.value).startswith("the producer raised RuntimeError in batch 3: the weights are rotten")
    assert "in make" in str(error.value)


def test_a_replan_reaches_the_far_end_in_the_middle_of_a_long_batch(tmp_path):
    hold = Hold(tmp_path, 2)
    with make_stream(engine=hold.engine, engine_options=hold.options) as stream:
        stream.take(8)
        hold.await_begin()
        stream.replan(first_k=100)
        assert list(stream.take(8).ids) == list(range(800, 808)), "although the one in work would never have ended"
        assert stream.stats().made <= 24


def test_times_are_by_the_trainers_clock():
    with make_stream(engine_options={"seconds": 0.02}) as stream:
        listed(stream, [8] * 5)
        stats = stream.stats()
    assert stats.stages["sample"].seconds == pytest.approx(0.02 * stats.made / 8, rel=0.01)
    assert 0 <= stats.mean_age_seconds < 5 and 8 / 5 < stream._recorder.rate() < 8 / 0.02

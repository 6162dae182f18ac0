"""Every image that was made is delivered, dropped, rejected or waiting: none is counted twice, none is forgotten."""

import sys
import time
from collections import Counter
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from streamaug.stream.batch import Recent, SynthBatch
from streamaug.stream.stream import Stream

from .fakes import Interrupt, images_of, interrupted_take, make_stream, take_for, until
from .holding import Hold, HoldingEngine

MADE: Counter = Counter()  # by the engine, in this process: what figures are compared with
WAIT_SECONDS = 60.0


class CountingEngine(HoldingEngine):
    def make(self, order, slot) -> int:
        accepted = super().make(order, slot)
        MADE["batches"] += 1
        MADE["accepted"] += accepted
        MADE["rejected"] += len(order) - accepted
        return accepted


def build(options: dict) -> CountingEngine:
    return CountingEngine(options)


class Loop:
    """A training loop that does all that one may do, and counts the fresh images that it was given."""

    def __init__(self, stream: Stream):
        self.stream = stream
        self.fresh = self.reused = 0
        self.saved = stream.state_dict()

    def take(self, n: int) -> None:
        batch = self.stream.take(n)
        self.fresh += int(batch.fresh.sum())
        self.reused += int((~batch.fresh).sum())

    def take_interrupted(self, place: int) -> None:
        """Interrupt a call where it enters a function for the `place`-th time, if it does: any but those that count."""
        calls = 0

        def trace(frame: Any, event: str, argument: Any) -> None:
            nonlocal calls
            files = [frame.f_code.co_filename, frame.f_back.f_code.co_filename]
            counts = any("/rates/" in name for name in files)
            if counts or "/streamaug/stream/" not in files[0] or frame.f_code.co_name == "<genexpr>":
                return
            calls += 1
            if calls == place:
                raise Interrupt

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            batch = self.stream.take(23)
        except Interrupt:
            return
        finally:
            sys.settrace(before)
        self.fresh += int(batch.fresh.sum())
        self.reused += int((~batch.fresh).sum())

    def feedback(self, seed: int) -> None:
        self.stream.feedback([0, 1, 2, 3], np.random.default_rng(seed).random(4))

    def judge(self, seed: int) -> None:
        self.stream.publish_judge(np.full(16, seed, np.uint8))

    def replan(self, seed: int) -> None:
        self.stream.replan(first_k=None if seed % 2 else 1000 + seed)

    def save(self, seed: int) -> None:
        self.saved = self.stream.state_dict()

    def load(self, seed: int) -> None:
        self.stream.load_state_dict(self.saved)

    def pause(self, seed: int) -> None:
        time.sleep(0.0002 * seed)  # the producer makes what is wanted, or no longer wanted


ACTIONS = st.one_of(
    *(st.tuples(st.just(name), st.integers(0, 29)) for name in ("take", "take", "feedback", "judge", "save", "pause")),
    *(st.tuples(st.just(name), st.integers(0, 29)) for name in ("replan", "load")),
    st.tuples(st.just("take_interrupted"), st.integers(1, 150)),
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(ACTIONS, max_size=25),
    st.sampled_from([0.0, 0.4]),
    st.sampled_from(["wait", "real", "reuse"]),
    st.integers(1, 2),
    st.booleans(),
)
def test_made_is_delivered_dropped_rejected_and_waiting_whatever_a_loop_does(
    actions, reject, starved, producers, in_order
):
    MADE.clear()
    options = {"reject": reject, "seconds": 0.0005}
    policy = {"starved": starved, "producers": producers, "in_order": in_order}
    engine = f"{__name__}:build"
    with make_stream(
        engine=engine, engine_options=options, backend="local", judge=np.zeros(16, np.uint8), **policy
    ) as stream:
        loop = Loop(stream)
        for name, number in actions:
            getattr(loop, name)(number)
        waiting = still(stream)
        stats = stream.stats()
    rejected = sum(number for reasons in stats.rejected.values() for number in reasons.values())
    assert stats.made + 8 * len(waiting[1:]) == 8 * MADE["batches"], "whatever was made is counted"
    assert rejected == MADE["rejected"] - sum(8 - count for count in waiting[1:])
    assert (stats.delivered - stats.reused, stats.reused) == (loop.fresh, loop.reused)
    assert stats.made == loop.fresh + stats.dropped + rejected + waiting[0]


def still(stream: Stream) -> list[int]:
    """Let producers finish; returns how many accepted images wait in the batch that is begun, and in each made one."""
    if not stream._started:
        return [0]
    rings, plan = stream._fleet.rings, stream._plan
    ends = time.monotonic() + WAIT_SECONDS
    while True:
        stream.take(0)  # which also takes in what is no longer wanted
        if all(ring.published == ring.issued for ring in rings) and all(one.number >= 0 for one in plan.undelivered):
            break
        assert time.monotonic() < ends, "producers do not come to an end"
        time.sleep(0.001)
    stream.take(0)
    current = stream._delivery._current
    begun = 0 if current is None else stream._dispatch.slot(current).count - current.offset
    return [begun, *(stream._dispatch.slot(one).count for one in plan.undelivered if one is not current)]


def test_a_batch_that_arrives_after_it_was_dropped_is_counted_as_made_and_dropped_however_late_that_is_seen(tmp_path):
    MADE.clear()
    hold = Hold(tmp_path, 1)
    options = hold.options | {"beat": False}  # it asks nobody whether it is wanted, so that it is made to its end
    with make_stream(engine=f"{__name__}:build", engine_options=options, backend="local", starved="real") as stream:
        stream.take(0)
        hold.await_begin()
        assert stream._fleet.rings[0].published == 1
        stream.replan(first_k=100)
        assert len(stream.take(8)) == 0
        hold.end()
        until(lambda: stream._fleet.rings[0].published == 5)
        assert stream.take(8).ids[0] == 800
        stats = stream.stats()
    assert (stats.made, stats.dropped, stats.delivered) == (8 + 8 + 8, 16, 8)


def test_an_interrupted_call_uses_up_none_of_the_times_that_an_image_may_be_served(tmp_path):
    hold = Hold(tmp_path, 2)
    with make_stream(engine=hold.engine, engine_options=hold.options, starved="reuse", max_reuse=3) as stream:
        served = Counter(image[0] for image in images_of(stream.take(16)))
        for _ in range(4):
            assert interrupted_take(stream, 400, 0.05)
        stalls = stream.stats().stalls
        again = stream.take(48)
        assert stream.stats().stalls == stalls, "nothing had been served: it need not wait"
        assert not again.fresh.any()
        served.update(image[0] for image in images_of(again))
        assert set(served.values()) == {4}


def test_no_image_is_served_more_often_than_it_may_be_although_its_first_call_was_interrupted():
    served: Counter = Counter()
    with make_stream(starved="reuse", max_reuse=1, engine_options={"seconds": 0.02}) as stream:
        for number in range(16):
            if number % 2 and (batch := take_for(stream, 40, 0.03)) is not None:
                served.update(batch.ids.tolist())  # a call that need not wait is not interrupted
            served.update(stream.take(24).ids.tolist())
        fresh = stream.stats().delivered - stream.stats().reused
    assert max(served.values()) <= 2
    assert len(served) == fresh, "no image counts as served again that was never delivered"


def test_images_that_an_undone_call_wrote_over_are_not_served_again_and_all_others_are():
    recent = Recent(np.empty((4, 1, 1, 1), np.uint8), max_reuse=2)
    batch, out = (SynthBatch.around(np.empty((n, 1, 1, 1), np.uint8)) for n in (6, 10))
    batch.ids[:] = np.arange(6)

    def served() -> list[int]:
        return out.ids[: recent.serve(out, 0, 10)].tolist()

    recent.begin()
    recent.add(batch[:4])
    assert served() == [3, 2, 1, 0]
    recent.keep()
    for _ in range(3):  # interrupted again and again
        recent.begin()
        recent.add(batch[4:])
        assert served() == [5, 4, 3, 2]
    recent.begin()
    assert served() == [3, 2]
    assert served() == []
    recent.keep()

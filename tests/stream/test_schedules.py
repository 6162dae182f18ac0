"""Whichever thread, process or signal comes in between, and however late: each case puts it where it once did harm."""

import contextlib
import os
import stat
import sys
import threading
import time
from collections import deque
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from streamaug.errors import StreamaugError
from streamaug.stream import ranks
from streamaug.stream.footprint import footprint
from streamaug.stream.producers import fleet, processes, sockets
from streamaug.stream.producers.fleet import Fleet
from streamaug.stream.producers.host import Host
from streamaug.stream.rates.pace import Demand
from streamaug.stream.ring import Ring
from streamaug.stream.ring.memory import Memory

from .fakes import Interrupt, assert_given_back, assert_within, images_of, listed, make_stream, undisturbed, until

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def unhandled(monkeypatch):
    """What ended a thread."""
    seen: list[object] = []
    monkeypatch.setattr(threading, "excepthook", lambda hooked: seen.append(hooked.exc_value))
    return seen


def interrupted_once(function, *, after: bool):
    """The function, whose first call is interrupted: before all that it does, or after it."""

    def call(*arguments, **options):
        first = not calls
        calls.append(True)
        if after or not first:
            result = function(*arguments, **options)
        if first:
            raise Interrupt
        return result

    calls: list[bool] = []
    return call


# An interruption while it starts, or ends.


@pytest.mark.parametrize("after", [False, True])
def test_a_first_call_interrupted_as_the_keepers_thread_starts_leaves_one_to_the_next(monkeypatch, after):
    before = footprint()
    with make_stream(producers=2) as stream:
        monkeypatch.setattr(threading.Thread, "start", interrupted_once(threading.Thread.start, after=after))
        with pytest.raises(Interrupt):
            stream.take(1)
        assert listed(stream, [40]) == undisturbed([40])
        assert stream.stats().restarts == 0
    assert_given_back(before)


def test_a_stream_whose_keeper_never_started_can_be_closed(monkeypatch):
    before = footprint()
    stream = make_stream(producers=2)
    monkeypatch.setattr(threading.Thread, "start", interrupted_once(threading.Thread.start, after=False))
    with pytest.raises(Interrupt):
        stream.take(1)
    stream.close()
    assert_given_back(before)


def test_what_a_first_call_had_allocated_when_it_was_interrupted_is_given_back(monkeypatch):
    before = footprint()
    with make_stream(producers=2) as stream:
        monkeypatch.setattr(fleet, "Lane", interrupted_once(fleet.Lane, after=True))
        with pytest.raises(Interrupt):
            stream.take(1)
        assert_given_back(before)
        assert listed(stream, [40]) == undisturbed([40])


def test_a_first_call_interrupted_after_ranks_met_keeps_the_producers_that_they_found(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda store=dist.HashStore(): store)
    before = footprint()
    options = {"shared": True, "world_size": 2, "seed": 11}
    with contextlib.ExitStack() as ends:
        ranks._opened.clear()
        one = ends.enter_context(make_stream(rank=0, **options))
        ranks._opened.clear()  # as in another process
        other = ends.enter_context(make_stream(rank=1, **options))
        monkeypatch.setattr(Fleet, "_new_lane", interrupted_once(Fleet._new_lane, after=False))
        with pytest.raises(Interrupt):
            one.take(1)
        other.start()
        for rank, stream in enumerate((one, other)):
            assert images_of(stream.take(40)) == undisturbed([40], rank=rank, world_size=2, seed=11)
    assert_given_back(before)


def test_a_descriptor_is_closed_once_also_when_that_was_interrupted(monkeypatch):
    memory, closed = Memory.create("memfd", 4096), []

    def close(fd: int, close=os.close) -> None:
        closed.append(fd)
        close(fd)

    monkeypatch.setattr(os, "close", close)
    fd = memory.fd
    monkeypatch.setattr(os, "close", interrupted_once(close, after=True))
    with pytest.raises(Interrupt):
        memory.close()
    memory.close()  # by now the number may be another's
    assert closed == [fd]


def test_a_redirection_interrupted_before_it_told_all_producers_is_told_them_by_the_next_call(monkeypatch):
    with make_stream(backend="local", producers=2) as stream:
        stream.take(12)
        state = stream.state_dict()
        issued = [ring.issued for ring in stream._fleet.rings]
        monkeypatch.setattr(Ring, "skip_to", interrupted_once(Ring.skip_to, after=True))
        with pytest.raises(Interrupt):
            stream.load_state_dict(state)
        assert listed(stream, [40]) == undisturbed([52])[12:]
        assert [ring.skipping_to for ring in stream._fleet.rings] == issued


# Another thread.


def test_closed_by_another_thread_while_it_starts_nothing_is_left(monkeypatch, unhandled):
    before = footprint()
    stream = make_stream(producers=2)
    closer = threading.Thread(target=stream.close)

    def create(*arguments, create=Memory.create, **options) -> Memory:
        if not stream._fleet.closed:
            closer.start()
            until(lambda: stream._fleet.closed)
            time.sleep(0.05)  # it waits for this call
        return create(*arguments, **options)

    monkeypatch.setattr(fleet.Memory, "create", create)
    with pytest.raises(StreamaugError, match="the stream was closed"):
        stream.take(1)
    closer.join(60)
    assert not closer.is_alive() and not unhandled
    assert_given_back(before)


def test_started_by_two_threads_at_once_it_starts_once(monkeypatch, unhandled):
    begun = []

    def begin(self: Fleet, begin=Fleet._begin) -> None:
        begun.append(self)
        time.sleep(0.1)
        begin(self)

    monkeypatch.setattr(Fleet, "_begin", begin)
    with make_stream() as stream:
        starter = threading.Thread(target=stream.start)
        starter.start()
        assert listed(stream, [40]) == undisturbed([40])
        starter.join(60)
        assert begun.count(stream._fleet) == 1 and not unhandled


def test_what_waited_for_a_call_to_end_and_finds_the_stream_closed_says_so(monkeypatch, tmp_path):
    stream = make_stream(manifest=tmp_path / "run.manifest")
    stream.take(1)
    require = stream._require_usable

    def require_and_be_overtaken() -> None:
        require()
        monkeypatch.undo()
        stream.close()

    monkeypatch.setattr(stream, "_require_usable", require_and_be_overtaken)
    with pytest.raises(StreamaugError, match="the stream was closed"):
        stream.replan()


def test_figures_of_the_pace_may_be_asked_for_while_calls_end():
    class Call(tuple):
        """In whose reading another call ends, as one of another thread may."""

        def __iter__(self):
            demand._calls.append(self)
            return super().__iter__()

    demand = Demand()
    demand._calls = deque([Call((0.1, 0.0, 8, 8))] * 16, maxlen=64)
    assert demand.seconds == pytest.approx(1.6)
    assert demand.per_second == pytest.approx(80)
    assert demand.pace(40, 0.5).missing == 0


def test_collected_in_its_keepers_thread_after_the_producers_end_it_gives_everything_back():
    before = footprint()
    stream = make_stream()
    stream.take(1)
    kept = stream._fleet
    stream._finalizer.detach()
    finish = kept._keeper._finish
    kept._keeper._finish = lambda: finish() or kept.close  # as in the thread that stays for other ranks
    kept._keeper.leave()
    until(lambda: not kept.rings)
    del stream
    assert_given_back(before)


# A signal's handler.


def test_a_handler_that_closes_the_stream_while_threads_start_and_are_awaited_stops_nothing():
    """`threading` holds locks of its own in the middle of its calls."""
    before, place = footprint(), 0
    closed = True
    while closed:
        place += 1
        closed = closed_in_first_take(place)
    assert place > 50
    assert_given_back(before)


def closed_in_first_take(place: int) -> bool:
    """Whether a first call of take came to a `place`-th line of `threading`, where a handler closed the stream."""
    stream, lines = make_stream(backend="local"), 0

    def trace(frame, event, argument):
        nonlocal lines
        if not frame.f_code.co_filename.endswith(("/threading.py", "/keeper.py", "/fleet.py", "/stream.py")):
            return None
        if event == "line" and frame.f_code.co_filename.endswith("/threading.py"):
            lines += 1
            if lines == place:
                stream.close()
        return trace

    def take() -> None:
        sys.settrace(trace)
        with contextlib.suppress(StreamaugError):
            stream.take(1)
        sys.settrace(None)

    taker = threading.Thread(target=take, daemon=True)
    taker.start()
    taker.join(30)
    assert not taker.is_alive(), f"in line {place}"
    stream.close()
    return lines >= place


# Another process.


def test_a_refusal_while_it_closes_ends_the_others_too(monkeypatch, unhandled):
    monkeypatch.setenv("STARTING", "thread")
    before = footprint()
    stream = make_stream(engine=f"{__package__}.starting:build", start_method="forkserver", producers=2)
    stream.start()
    stream.close()
    assert not unhandled
    assert_given_back(before)


def test_a_process_that_never_reads_what_it_is_to_do_holds_nobody_up(monkeypatch, tmp_path):
    deaf = tmp_path / "python"
    deaf.write_text("#!/bin/sh\nexec sleep 60\n")
    deaf.chmod(deaf.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(deaf))

    def start() -> float:
        output = processes.Output()
        began = time.monotonic()
        process = processes.start("none", {"names": "n" * 2**20}, [], dict(os.environ), output)
        took = time.monotonic() - began
        process.kill()
        process.wait()
        output.close()
        return took

    assert_within(10, start)


def test_an_exception_of_the_engine_does_not_write_over_why_a_rank_was_refused():
    def guest(admitted: bool):
        told: list = []
        end = SimpleNamespace(ring=SimpleNamespace(closing=False), k=None, fail=told.append)
        return SimpleNamespace(end=end, admitted=admitted, told=told)

    listening, _ = sockets.listen()
    with listening:
        host = Host(listening, memoryview(bytearray(8)).cast("q"), {})
        host._guests = [guest(True), guest(False)]
        host._fail(RuntimeError("rotten"))
    assert [[failure.message for failure in each.told] for each in host._guests] == [["rotten"], []]

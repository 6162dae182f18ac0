"""Wherever in the code of `take` an interruption strikes, the run is afterwards what it is without that call: the same
images, and the same record of them."""

import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from streamaug.stream.manifest import Manifest

from .fakes import Interrupt, images_of, listed, make_stream, undisturbed


def interrupt_at(stream, n: int, line: int) -> bool | None:
    """Call take and interrupt it before its `line`-th line of Python; None when it had ended before that, or as good
    as ended: nothing can be undone once it is returning."""
    lines = 0

    def trace(frame, event, argument):
        nonlocal lines
        if "/streamaug/stream/" not in frame.f_code.co_filename:
            return None
        if event == "line":
            lines += 1
            if lines == line:
                raise Interrupt
        return trace

    steps, before = stream._recorder.steps, sys.gettrace()
    sys.settrace(trace)
    try:
        stream.take(n)
        return None
    except Interrupt:
        return None if stream._before is None and stream._recorder.steps > steps else True
    finally:
        sys.settrace(before)


def run(path: Path, in_flight: int, line: int | None) -> tuple[list[tuple], list[int]] | None:
    """(images, ids that the manifest has) of a run that reacts, one of whose calls is interrupted."""
    path.unlink(missing_ok=True)
    options = {"engine_options": {"reject": 0.3}, "judge": np.zeros(16, np.uint8), "producers": min(in_flight, 2)}
    with make_stream(backend="local", in_flight=in_flight, manifest=path, **options) as stream:
        got = images_of(stream.take(8))
        if line is not None and interrupt_at(stream, 11, line) is None:
            return None
        for number in range(4):
            stream.feedback([0, 1, 2, 3], [1.0 + number, 1.0, 1.0, 1.0])
            stream.publish_judge(np.full(16, number, np.uint8))
            got += images_of(stream.take(7))
    ids = []
    with Manifest(path) as found:
        for batch in found.batches.values():
            order, reasons = found.contents(batch)
            ids += order.images["id"][reasons == 0][: batch.delivered].tolist()
    return got, ids


def compare(path: Path, in_flight: int, every: int) -> None:
    undisturbed = run(path, in_flight, None)
    assert undisturbed is not None and undisturbed[1] == [image[0] for image in undisturbed[0]]
    line = 1
    while (disturbed := run(path, in_flight, line)) is not None:
        assert disturbed == undisturbed, f"interrupted before line {line}"
        line += every
    assert line > 200, "the call was interrupted to its end"


@pytest.mark.parametrize("in_flight", [1, 4])
def test_a_call_interrupted_at_many_places_leaves_no_trace(tmp_path, in_flight):
    compare(tmp_path / "run.manifest", in_flight, every=23)


@pytest.mark.matrix
@pytest.mark.timeout(600)
@pytest.mark.parametrize("in_flight", [1, 2, 4])
def test_a_call_interrupted_before_any_line_leaves_no_trace(tmp_path, in_flight):
    compare(tmp_path / "run.manifest", in_flight, every=1)


def test_a_first_call_interrupted_while_it_starts_the_producers_leaves_them_to_the_next_one(monkeypatch):
    start = threading.Thread.start

    def start_and_be_interrupted(thread: threading.Thread) -> None:
        start(thread)
        monkeypatch.undo()
        raise Interrupt

    with make_stream(producers=2) as stream:
        monkeypatch.setattr(threading.Thread, "start", start_and_be_interrupted)
        with pytest.raises(Interrupt):
            stream.take(1)
        assert listed(stream, [40]) == undisturbed([40])
        assert stream.stats().restarts == 0


REDIRECTIONS = {
    "replan": lambda stream, state: stream.replan(first_k=100),
    "load": lambda stream, state: stream.load_state_dict(state),
}


def redirected(name: str, place: int | None) -> tuple[list[int], bool]:
    """(ids that follow a redirection which is interrupted as it enters a function for the `place`-th time, whether it
    was)."""
    calls = 0

    def trace(frame, event, argument):
        nonlocal calls
        calls += "/streamaug/stream/" in frame.f_code.co_filename and frame.f_code.co_name != "<genexpr>"
        if calls == place:
            raise Interrupt

    with make_stream(backend="local", engine_options={"reject": 0.3}, producers=2) as stream:
        stream.take(13)
        state, before = stream.state_dict(), sys.gettrace()
        stream.take(17)
        interrupted = place == 0
        try:
            if place is not None:
                sys.settrace(trace)
            if not interrupted:
                REDIRECTIONS[name](stream, state)
        except Interrupt:
            interrupted = True
        finally:
            sys.settrace(before)
        return stream.take(40).ids.tolist(), interrupted


@pytest.mark.parametrize("name", REDIRECTIONS)
def test_a_redirection_interrupted_anywhere_did_not_happen_or_did(name):
    (old, _), (new, _) = redirected(name, 0), redirected(name, None)
    assert old != new
    place, found = 1, []
    while (outcome := redirected(name, place))[1]:
        assert outcome[0] in (old, new), f"interrupted at call {place}"
        found.append(outcome[0] == old)
        place += 1
    assert place > 10 and found == sorted(found, reverse=True)

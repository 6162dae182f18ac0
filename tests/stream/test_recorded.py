"""Resume, interrupted calls, kills, feedback, a live judge and the manifest together: each id is recorded once, in the
order of its delivery, and none is missing."""

import copy
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from streamaug.stream.manifest import Manifest

from .fakes import images_of, interrupted_take, make_stream

ROOT = Path(__file__).parents[2]
REJECT = {"reject": 0.3}


def step(stream, number: int) -> list[tuple]:
    """A training step that reacts: feedback at each, a new judge at some."""
    batch = stream.take(1 + 5 * number % 13)
    stream.feedback(batch.labels, 0.5 + batch.labels * (number % 4))
    if number % 3 == 1:
        stream.publish_judge(np.full(16, number, np.uint8))
    return images_of(batch)


def open_stream(path: Path | None, **options):
    return make_stream(manifest=path, judge=np.zeros(16, np.uint8), **({"engine_options": REJECT} | options))


@pytest.fixture(scope="module")
def uninterrupted() -> list[list[tuple]]:
    with open_stream(None, backend="local") as stream:
        return [step(stream, number) for number in range(20)]


def recorded(path: Path) -> list[tuple[int, bytes]]:
    """(id, the judge that let it through) of every image that the manifest says was delivered, in its order."""
    found = []
    with Manifest(path) as manifest:
        assert manifest.torn == 0
        for batch in manifest.batches.values():
            order, reasons = manifest.contents(batch)
            ids = order.images["id"][reasons == 0][: batch.delivered].tolist()
            found += [(number, manifest.judge(batch.judge)[1].tobytes()) for number in ids]
    return found


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> list[tuple[int, bytes]]:
    """What the uninterrupted run records."""
    path = tmp_path_factory.mktemp("plain") / "run.manifest"
    with open_stream(path, backend="local") as stream:
        ids = [image[0] for number in range(20) for image in step(stream, number)]
    assert [number for number, _ in recorded(path)] == ids
    assert len({judge for _, judge in recorded(path)}) > 3
    return recorded(path)


def test_interrupted_broken_off_and_resumed_with_other_producers_every_id_is_recorded_once(
    tmp_path, uninterrupted, expected
):
    path, got, states = tmp_path / "run.manifest", [], {}
    slow = {"engine_options": REJECT | {"seconds": 0.004}}
    for begin, end, producers in ((0, 7, 1), (4, 12, 3), (9, 20, 2)):
        with open_stream(path, producers=producers, **slow) as stream:
            if begin:
                stream.load_state_dict(states[begin])
                del got[begin:]
            for number in range(begin, end):
                states[number] = copy.deepcopy(stream.state_dict())
                assert interrupted_take(stream, 500, 0.05)
                got.append(step(stream, number))
            assert interrupted_take(stream, 500, 0.05)
    assert got == uninterrupted
    assert recorded(path) == expected


@pytest.mark.parametrize("said", ["nothing", "feedback"])
def test_what_an_interrupted_call_opened_is_not_recorded_as_delivered_whatever_is_said_before_the_end(tmp_path, said):
    path = tmp_path / "run.manifest"
    with open_stream(path, engine_options=REJECT | {"seconds": 0.01}) as stream:
        ids = stream.take(3).ids.tolist()
        assert interrupted_take(stream, 500, 0.4)
        if said == "feedback":
            stream.feedback([0], [1.0])
    assert [number for number, _ in recorded(path)] == ids


def test_a_run_that_went_back_and_ended_there_is_recorded_up_to_there(tmp_path):
    path = tmp_path / "run.manifest"
    with open_stream(path, backend="local") as stream:
        ids = stream.take(11).ids.tolist()
        state = stream.state_dict()
        stream.take(30)
        stream.load_state_dict(state)
    assert [number for number, _ in recorded(path)] == ids


KILLED = """
import os, pickle, signal, sys
from tests.stream.test_recorded import open_stream, step

path, last = sys.argv[1], int(sys.argv[2])
pwrite, records = os.pwrite, []

def torn(fd, data, at):
    records.append(at)
    if len(records) == last:
        pwrite(fd, data[: len(data) // 2], at)
        os.kill(os.getpid(), signal.SIGKILL)
    return pwrite(fd, data, at)

with open_stream(path, backend="local") as stream:
    os.pwrite = torn
    for number in range(20):
        state = stream.state_dict()
        with open(path + ".state", "wb") as file:
            pickle.dump((number, state), file)
        step(stream, number)
"""


@pytest.mark.parametrize("last", [2, 9, 17])  # which record is torn: a batch's, or a judge's
def test_a_trainer_killed_in_the_middle_of_a_record_goes_on_without_a_gap(
    tmp_path, uninterrupted, expected, last, caplog
):
    import pickle

    path = tmp_path / "run.manifest"
    command = [sys.executable, "-c", KILLED, str(path), str(last)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with Manifest(path) as found:
        torn = found.torn
    assert torn > 0
    number, state = pickle.loads(Path(f"{path}.state").read_bytes())
    with open_stream(path, backend="local", producers=2) as stream:
        assert f"the last {torn} bytes were not written whole and are cut off" in caplog.text
        stream.load_state_dict(state)
        assert [step(stream, at) for at in range(number, 20)] == uninterrupted[number:]
    assert recorded(path) == expected


def test_a_state_without_tensors_resumes_into_the_same_manifest_from_json(tmp_path):
    path = tmp_path / "run.manifest"
    with make_stream(manifest=path, backend="local", engine_options=REJECT) as stream:
        ids = stream.take(13).ids.tolist()
        state = json.dumps(stream.state_dict())
        stream.take(9)
    with make_stream(manifest=path, backend="local", producers=3, engine_options=REJECT) as stream:
        stream.load_state_dict(json.loads(state))
        ids += stream.take(40).ids.tolist()
    with Manifest(path) as found:
        kept = []
        for batch in found.batches.values():
            order, reasons = found.contents(batch)
            kept += order.images["id"][reasons == 0][: batch.delivered].tolist()
    assert kept == ids

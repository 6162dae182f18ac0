"""An interrupted run that goes on elsewhere equals the uninterrupted one, image for image, bit for bit."""

import copy
import json
import time

import numpy as np
import pytest

from streamaug.errors import StateError

from .fakes import images_of, interrupted_take, listed, make_stream, undisturbed
from .holding import Hold

STEPS = 24
PLAIN, FEEDBACK, LIVE_JUDGE = "plain", "feedback", "live judge"


def options_of(kind: str) -> dict:
    judge = np.zeros(16, np.uint8) if kind == LIVE_JUDGE else None
    return {"judge": judge, "engine_options": {"reject": 0.4}}


def step(stream, kind: str, number: int) -> list[tuple]:
    """One training step: numbers of images that straddle batches, feedback, sometimes a new judge."""
    batch = stream.take(1 + 5 * number % 13)
    if kind != PLAIN:
        stream.feedback(batch.labels, 0.5 + batch.labels * (number % 4))
    if kind == LIVE_JUDGE and number % 3 == 1:
        stream.publish_judge(np.full(16, number, np.uint8))
    return images_of(batch)


@pytest.fixture(scope="module")
def uninterrupted():
    runs = {}
    for kind in (PLAIN, FEEDBACK, LIVE_JUDGE):
        with make_stream(backend="local", **options_of(kind)) as stream:
            images, states = [], [stream.state_dict()]
            for number in range(STEPS):
                images.append(step(stream, kind, number))
                states.append(copy.deepcopy(stream.state_dict()))
        runs[kind] = images, states
    return runs


def resumed(state: dict, kind: str, first: int, **options) -> list[list[tuple]]:
    with make_stream(**options_of(kind), **options) as stream:
        stream.load_state_dict(state)
        return [step(stream, kind, number) for number in range(first, STEPS)]


@pytest.mark.parametrize("producers", [1, 2, 3])
@pytest.mark.parametrize("kind", [PLAIN, FEEDBACK, LIVE_JUDGE])
def test_resumed_at_every_step_the_run_goes_on_the_same(uninterrupted, kind, producers):
    images, states = uninterrupted[kind]
    for position in range(STEPS):
        assert resumed(states[position], kind, position, backend="local", producers=producers) == images[position:]


def masks_of(stream) -> dict[int, bytes]:
    """What became of each order, by batch: filled in as batches arrive in the trainer."""
    masks, arrived = {}, stream._recorder.arrived

    def note(order, slot):
        if not slot.abandoned:
            masks[order.k] = slot.reasons.tobytes()
        return arrived(order, slot)

    stream._recorder.arrived = note
    return masks


@pytest.mark.parametrize("kind", [PLAIN, FEEDBACK, LIVE_JUDGE])
def test_resumed_it_rejects_the_same_images_for_the_same_reasons(uninterrupted, kind):
    _, states = uninterrupted[kind]
    with make_stream(backend="local", **options_of(kind)) as stream:
        expected = masks_of(stream)
        for number in range(STEPS):
            step(stream, kind, number)
    assert any(any(mask) for mask in expected.values())
    for position, backend in ((3, "local"), (11, "process"), (17, "local")):
        with make_stream(producers=2, backend=backend, **options_of(kind)) as stream:
            masks = masks_of(stream)
            stream.load_state_dict(states[position])
            for number in range(position, STEPS):
                step(stream, kind, number)
        first = states[position]["undelivered"][0][0] if states[position]["undelivered"] else states[position]["next_k"]
        assert masks == {k: mask for k, mask in expected.items() if k >= first}


@pytest.mark.matrix
@pytest.mark.timeout(900)
@pytest.mark.parametrize("producers", [1, 2, 3])
@pytest.mark.parametrize("kind", [PLAIN, FEEDBACK, LIVE_JUDGE])
def test_resumed_at_every_step_with_processes_the_run_goes_on_the_same(uninterrupted, kind, producers):
    images, states = uninterrupted[kind]
    for position in range(STEPS):
        assert resumed(states[position], kind, position, producers=producers) == images[position:], position


@pytest.mark.matrix
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", [PLAIN, FEEDBACK, LIVE_JUDGE])
def test_broken_off_after_every_step_and_resumed_by_other_processes_it_is_the_same_run(uninterrupted, kind):
    images, states = uninterrupted[kind]
    state = states[0]
    for number in range(STEPS):
        with make_stream(producers=1 + number % 3, **options_of(kind)) as stream:
            stream.load_state_dict(state)
            assert step(stream, kind, number) == images[number], number
            state = copy.deepcopy(stream.state_dict())


@pytest.mark.parametrize(("saved_with", "producers"), [(1, 2), (2, 3), (3, 1)])
@pytest.mark.parametrize("kind", [PLAIN, LIVE_JUDGE])
def test_with_processes_and_another_number_of_them_it_goes_on_the_same(uninterrupted, kind, saved_with, producers):
    images, _ = uninterrupted[kind]
    position = 4 * saved_with + 1
    with make_stream(**options_of(kind), producers=saved_with) as stream:
        before = [step(stream, kind, number) for number in range(position)]
        state = stream.state_dict()
        step(stream, kind, position)
    assert before == images[:position]
    assert resumed(state, kind, position, producers=producers) == images[position:]


def test_a_resumed_run_can_be_resumed_again(uninterrupted):
    images, states = uninterrupted[LIVE_JUDGE]
    with make_stream(backend="local", **options_of(LIVE_JUDGE)) as stream:
        stream.load_state_dict(states[5])
        assert [step(stream, LIVE_JUDGE, number) for number in range(5, 11)] == images[5:11]
        state = stream.state_dict()
    assert resumed(state, LIVE_JUDGE, 11, backend="local") == images[11:]


def test_a_running_stream_can_go_back(uninterrupted):
    images, states = uninterrupted[LIVE_JUDGE]
    with make_stream(producers=2, **options_of(LIVE_JUDGE)) as stream:
        for number in range(9):
            step(stream, LIVE_JUDGE, number)
        stream.publish_judge(np.full(16, 99, np.uint8))  # versions of a future that will not happen
        stream.take(40)
        stream.load_state_dict(states[4])
        assert [step(stream, LIVE_JUDGE, number) for number in range(4, STEPS)] == images[4:]


@pytest.mark.parametrize("kind", [PLAIN, FEEDBACK])
def test_without_a_live_judge_the_state_is_json(uninterrupted, kind):
    images, states = uninterrupted[kind]
    state = json.loads(json.dumps(states[7]))
    assert resumed(state, kind, 7, backend="local") == images[7:]


def test_states_of_a_live_judge_are_tensors_that_torch_saves_and_loads(uninterrupted, tmp_path):
    import torch

    images, states = uninterrupted[LIVE_JUDGE]
    assert all(isinstance(value, torch.Tensor) for value in states[12]["tensors"].values())
    torch.save(states[12], tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert resumed(state, LIVE_JUDGE, 12, backend="local") == images[12:]


def test_a_replanned_stream_resumes_with_its_weights():
    rows = np.zeros(12)
    rows[[0, 1, 2, 3, 8]] = [1, 2, 3, 4, 5]
    with make_stream(backend="local") as stream:
        stream.take(3)
        stream.replan(row_weights=rows, class_weights=np.array([3.0, 1, 1, 0]), first_k=70)
        listed(stream, [13])
        state = json.loads(json.dumps(stream.state_dict()))
        rest = listed(stream, [50])
    with make_stream(backend="local") as stream:
        stream.load_state_dict(state)
        assert listed(stream, [50]) == rest


def test_without_order_a_resumed_run_delivers_every_batch_once():
    with make_stream(in_order=False, producers=2, engine_options={"seconds": 0.005}) as stream:
        before = listed(stream, [45])
        state = stream.state_dict()
    with make_stream(in_order=False, producers=3, engine_options={"seconds": 0.005}) as stream:
        stream.load_state_dict(state)
        after = listed(stream, [115])
    ids = [image[0] for image in before + after]
    assert len(set(ids)) == 160


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batch_size": 16}, r"stream.batch_size was 8 when it was saved and is 16 now"),
        ({"in_flight": 5}, r"stream.in_flight was 4 when it was saved and is 5 now"),
        (
            {"seed": 1},
            r"the plan \(seed, recipes, bank or model\) was \w{16} when it was saved and is \w{16} now",
        ),
        ({"plan_extra": {"model": "other"}}, r"the plan"),
        ({"rank": 1, "world_size": 2}, r"rank was 0 when it was saved and is 1 now"),
        ({"judge": np.ones(16, np.uint8)}, r"the judge was \w{16} when it was saved and is \w{16} now"),
        ({"judge": np.zeros(17, np.uint8)}, r"the size of the judge in bytes was 16 .* is 17 now"),
    ],
)
def test_a_state_of_another_run_is_refused_with_both_values(options, text):
    judge = np.zeros(16, np.uint8)
    with make_stream(backend="local", judge=judge) as stream:
        stream.take(3)
        state = stream.state_dict()
    with make_stream(backend="local", **({"judge": judge} | options)) as stream:
        with pytest.raises(StateError, match=text):
            stream.load_state_dict(state)
        assert stream.take(1).ids[0] in (0, 8, 16)  # and nothing happened to the stream


def whole_state() -> dict:
    """With feedback, and a judge that undelivered orders name."""
    with make_stream(backend="local", judge=np.zeros(16, np.uint8)) as stream:
        for number in range(3):
            stream.take(11)
            stream.feedback([0, 1, 2, 3], [1.0, 2.0, 3.0, 1.0 + number])
            stream.publish_judge(np.full(16, number, np.uint8))
        return stream.state_dict()


@pytest.mark.parametrize("state", [None, 5, "state.json", []])
def test_what_is_no_state_is_refused(state):
    with make_stream(backend="local") as stream, pytest.raises(StateError, match="the dict that state_dict gave"):
        stream.load_state_dict(state)


def test_a_state_that_is_not_whole_is_refused_with_what_it_lacks_and_the_stream_stays_where_it_is():
    state = whole_state()
    judges, orders = state["tensors"], state["undelivered"]
    broken = {
        "it names judge 3, which is not under": {"tensors": {k: v for k, v in judges.items() if k != "judge_3"}},
        "judge 2 has 5 bytes, not 16": {"tensors": judges | {"judge_2": judges["judge_2"][:5]}},
        "it has 4 undelivered batches and 1 offsets": {"offsets": [0]},
        "it names weights 99, which it does not have": {"undelivered": [[0, 99, 0], *orders[1:]]},
    }
    with make_stream(backend="local", judge=np.zeros(16, np.uint8)) as stream:
        got = listed(stream, [5])
        for message, change in broken.items():
            with pytest.raises(StateError, match=message):
                stream.load_state_dict(state | change)
        for key in state.keys() - {"format"}:
            with pytest.raises(StateError, match=f"it has no '{key}'"):
                stream.load_state_dict({name: kept for name, kept in state.items() if name != key})
        assert got + listed(stream, [30]) == undisturbed([35], judge=np.zeros(16, np.uint8))


def test_a_state_of_another_format_is_refused():
    with (
        make_stream(backend="local") as stream,
        pytest.raises(StateError, match="format 99, this version reads format 3"),
    ):
        stream.load_state_dict(stream.state_dict() | {"format": 99})


def test_other_threads_are_only_warned_of(caplog):
    with make_stream(backend="local") as stream:
        state = stream.state_dict()
    with make_stream(backend="local", threads=2) as stream:
        stream.load_state_dict(state)
    assert "stream.threads was 1 when the state was saved and is 2 now" in caplog.text


# Interrupted calls.


def test_an_interrupted_take_loses_nothing_and_leaves_an_exact_state():
    slow = {"engine_options": {"seconds": 0.05, "reject": 0.3}}
    expected = undisturbed([200], engine_options={"reject": 0.3})
    with make_stream(**slow) as stream:
        got = listed(stream, [7])
        assert interrupted_take(stream, 100, 0.3)
        state = json.loads(json.dumps(stream.state_dict()))
        got += listed(stream, [3])
        between = json.loads(json.dumps(stream.state_dict()))
        got += listed(stream, [40])
    assert got == expected[:50]
    for saved, at in ((state, 7), (between, 10)):
        with make_stream(backend="local", engine_options={"reject": 0.3}) as stream:
            stream.load_state_dict(saved)
            assert listed(stream, [60]) == expected[at : at + 60]


def test_an_interrupted_take_changes_nothing_also_when_the_loop_reacts_afterwards():
    def react(stream, after: int) -> list[tuple]:
        images = []
        for number in range(after, after + 6):
            images += listed(stream, [3])
            stream.feedback([0, 1, 2, 3], [1.0 + number, 1.0, 1.0, 1.0])
            stream.publish_judge(np.full(16, number, np.uint8))
        return images

    judge = np.zeros(16, np.uint8)
    with make_stream(backend="local", judge=judge) as stream:
        expected = listed(stream, [7]) + react(stream, 0) + react(stream, 6) + listed(stream, [40])
    with make_stream(judge=judge, engine_options={"seconds": 0.03}) as stream:
        got = listed(stream, [7])
        assert interrupted_take(stream, 200, 0.3)
        got += react(stream, 0)
        state = copy.deepcopy(stream.state_dict())
        got += react(stream, 6)
        assert interrupted_take(stream, 200, 0.3)
        stats = stream.stats()
        assert (stats.delivered, sum(stats.delivered_per_class.values())) == (43, 43)
        got += listed(stream, [40])
    assert got == expected
    with make_stream(backend="local", judge=judge) as stream:
        stream.load_state_dict(state)
        assert react(stream, 6) + listed(stream, [40]) == expected[25:]


@pytest.mark.parametrize("taken", [8, 11])  # a whole batch, after which the interrupted call plans another; or not
def test_what_is_said_right_after_an_interrupted_take_counts_as_if_it_had_not_been(taken):
    def run(interrupted: bool, **options) -> list[tuple]:
        with make_stream(judge=np.zeros(16, np.uint8), **options) as stream:
            got = listed(stream, [taken])
            assert not interrupted or interrupted_take(stream, 500, 0.15)
            stream.feedback([0, 1, 2, 3], [4.0, 1.0, 1.0, 1.0])
            stream.publish_judge(np.full(16, 9, np.uint8))
            state = copy.deepcopy(stream.state_dict())
            got += listed(stream, [60])
            stream.load_state_dict(state)
            assert listed(stream, [60]) == got[-60:]
            return got

    assert run(True, engine_options={"seconds": 0.01}) == run(False, backend="local")


def test_calls_that_are_always_interrupted_before_a_batch_is_made_do_get_it_made(tmp_path):
    hold = Hold(tmp_path, 1)
    with make_stream(in_flight=1, engine=hold.engine, engine_options=hold.options) as stream:
        got = listed(stream, [8])
        for _ in range(5):
            assert interrupted_take(stream, 1, 0.05)
            hold.await_begin()
        hold.end()
        while interrupted_take(stream, 1, 0.05):
            pass
        assert hold.begun == 1, "it was not given up and begun again"
        assert got + listed(stream, [8]) == undisturbed([8]) + undisturbed([17])[9:]


def test_interrupted_again_and_again_it_still_delivers_every_image():
    expected = undisturbed([120])
    with make_stream(producers=2, engine_options={"seconds": 0.01}) as stream:
        got, rng = [], np.random.default_rng(0)
        deadline = time.monotonic() + 60
        while len(got) < 100 and time.monotonic() < deadline:
            interrupted_take(stream, 50, float(rng.uniform(0.005, 0.06)))
            got += listed(stream, [4])
        # calls that were not interrupted delivered images too: what was kept is a subsequence in order
        positions = [expected_index(expected, image) for image in got]
        assert positions == sorted(positions)


def expected_index(expected: list[tuple], image: tuple) -> int:
    return image[0] if image[0] >= len(expected) else expected.index(image)

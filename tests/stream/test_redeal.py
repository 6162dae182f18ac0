"""One rank goes on where two left off, with a judge and class weights that changed all the time."""

import copy

import numpy as np
import pytest

from streamaug.stream.redeal import redeal
from streamaug.stream.stream import Stream

from .fakes import images_of, make_stream

STEPS = 30


def step(stream: Stream, number: int) -> list[tuple]:
    """Few images beside a new judge each time: every order names versions of its own."""
    batch = stream.take(2)
    stream.feedback(batch.labels, 0.5 + batch.labels * (number % 4) + stream.rank)
    stream.publish_judge(np.full(16, number, np.uint8))
    return images_of(batch)


def options_of(**options) -> dict:
    return {"judge": np.zeros(16, np.uint8), "backend": "local", "engine_options": {"reject": 0.4}} | options


@pytest.fixture(scope="module")
def dealt():
    states = []
    for rank in (0, 1):
        with make_stream(rank=rank, world_size=2, **options_of()) as stream:
            for number in range(60):
                step(stream, number)
            states.append(copy.deepcopy(stream.state_dict()))
    assert len({judge for state in states for _, _, judge in state["undelivered"]}) > 6, "more than there are mailboxes"
    return redeal(states, 1)[0]


def test_new_weights_do_not_take_the_version_of_any_that_an_order_of_another_rank_names(dealt):
    assert dealt["latest_weights"] == max(map(int, dealt["weights"]))


@pytest.mark.parametrize("producers", [1, 3])
def test_all_that_was_dealt_out_is_delivered_and_any_step_of_it_can_be_resumed(dealt, producers):
    images, states = [], []
    with make_stream(**options_of(producers=producers)) as stream:
        stream.load_state_dict(dealt)
        for number in range(STEPS):
            states.append(copy.deepcopy(stream.state_dict()))
            images.append(step(stream, number))
    for position in (3, 9, 15):
        with make_stream(**options_of()) as stream:
            stream.load_state_dict(states[position])
            assert [step(stream, number) for number in range(position, STEPS)] == images[position:]

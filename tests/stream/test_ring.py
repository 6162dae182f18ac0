"""The protocol of sequence numbers alone: both sides in one process, interleaved and killed at any point."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamaug.stream.ring import FAILED, Layout, Mailboxes, Ring
from streamaug.stream.ring.memory import Memory

from .fakes import IMAGE_SHAPE, make_planner

BATCH = 4


def make_ring(slots: int) -> Ring:
    layout = Layout(BATCH, IMAGE_SHAPE, slots)
    return Ring(Memory(layout.nbytes, None), layout)


class Producer:
    """Makes a batch in three steps, as a process would between instructions: half, the rest, publish."""

    def __init__(self, ring: Ring):
        self.ring = ring
        self.number = ring.published
        self.steps = 0

    def step(self) -> None:
        if self.ring.issued <= self.number:
            return
        slot = self.ring.slot(self.number)
        half = slice(0, BATCH // 2) if self.steps == 0 else slice(BATCH // 2, BATCH)
        if self.steps < 2:
            slot.ids[half] = slot.order.images["id"][half]
            slot.images[half] = slot.order.k % 251
            self.steps += 1
            return
        slot.finish(BATCH, abandoned=False, began_ns=1, ended_ns=2, stage_ns=[0] * 5)
        self.ring.publish(self.number)
        self.number, self.steps = self.number + 1, 0


@settings(max_examples=200, deadline=None)
@given(
    slots=st.integers(1, 4),
    script=st.lists(st.sampled_from(["issue", "step", "step", "kill", "take"]), max_size=120),
)
def test_every_batch_is_seen_once_in_order_and_complete_however_the_producer_dies(slots, script):
    planner = make_planner(BATCH)
    ring = make_ring(slots)
    producer, issued, taken = Producer(ring), 0, 0
    for act in script:
        if act == "issue" and issued - taken < slots:
            ring.issue(planner.batch(issued, planner.uniform()))
            issued += 1
        elif act == "step":
            producer.step()
        elif act == "kill":
            if ring.issued > producer.number:
                ring.slot(producer.number).images[:] = 255  # whatever a dying writer leaves behind
            producer = Producer(ring)
        elif act == "take" and ring.published > taken:
            slot = ring.slot(taken)
            assert slot.count == BATCH
            assert (slot.images == taken % 251).all()
            assert (slot.ids == planner.batch(taken, planner.uniform()).images["id"]).all()
            taken += 1
        assert taken <= ring.published <= ring.issued == issued <= taken + slots


def test_orders_pass_through_a_slot_unchanged():
    order = make_planner(BATCH).batch(7, make_planner(BATCH).uniform(3), judge_version=5)
    ring = make_ring(2)
    assert ring.issue(order, judge_post=9) == 0
    read = ring.slot(0).order
    assert (read.k, read.start, read.plan_version, read.judge_version) == (7, order.start, 3, 5)
    assert (read.images == order.images).all()
    assert ring.slot(0).judge_post == 9


def test_fields_of_a_slot_do_not_overlap():
    ring = make_ring(3)
    slots = [ring.slot(number) for number in range(3)]
    for at, slot in enumerate(slots):
        for value, name in enumerate(("images", "ids", "labels", "scores", "source", "reasons")):
            getattr(slot, name)[:] = 10 * at + value
        slot.finish(at, abandoned=False, began_ns=at, ended_ns=at + 1, stage_ns=[at] * 5)
    for at, slot in enumerate(slots):
        for value, name in enumerate(("images", "ids", "labels", "scores", "source", "reasons")):
            assert (getattr(slot, name) == 10 * at + value).all()
        assert (slot.count, slot.span_ns, list(slot.stage_ns)) == (at, (at, at + 1), [at] * 5)


@pytest.mark.parametrize("text", ["short", "x" * 200_000, "ü€😀" * 50_000])
def test_an_exception_of_any_length_arrives(text):
    ring = make_ring(1)
    ring.fail("ValueError", text, text, 4)
    report = ring.error()
    assert ring.state == FAILED
    assert report["type"] == "ValueError" and report["k"] == 4
    assert text.endswith(report["message"]) and text.endswith(report["traceback"])
    assert len(report["traceback"]) >= min(len(text), 1000)
    json.dumps(report)


def test_mailboxes_never_give_up_a_post_that_is_still_named():
    boxes = Mailboxes(Memory(Mailboxes.nbytes(3, 10), None), 3, 10)
    boxes.clear()
    for post in range(20):
        keep = {post - 1, post - 2} - {-1, -2}
        boxes.write(post, np.full(10, post, np.uint8), keep=keep)
        for kept in {*keep, post}:
            state = boxes.read(kept)
            assert state is not None and (state == kept).all()
    assert boxes.read(5) is None


def test_a_mailbox_that_is_being_written_is_not_read():
    memory = Memory(Mailboxes.nbytes(2, 4), None)
    boxes = Mailboxes(memory, 2, 4)
    boxes.clear()
    boxes.write(0, np.zeros(4, np.uint8), keep=set())
    memory.view[:8].cast("q")[0] = -1
    assert boxes.read(0) is None

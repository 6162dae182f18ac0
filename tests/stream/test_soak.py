"""Long runs: a hundred kills, a million images, eight hours' worth of batches, a hundred openings.

`pytest -m soak`; with STREAMAUG_SOAK_JSON=FILE the figures are written there, with hardware and versions.
"""

import json
import os
import signal
import statistics
import time
from pathlib import Path

import numpy as np
import pytest

from streamaug.stream.footprint import footprint, memory_mb

from .fakes import images_of, listed, make_stream, producers_of, running, undisturbed, until

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]

FLAT_MB = 1.0  # by how much the memory of a process may differ between the first and the last quarter
FILL = "streamaug.stream.hashing:build_fill"


@pytest.fixture(scope="module")
def figures():
    """What was measured, by test; written when the last one has run."""
    found: dict[str, dict] = {}
    yield found
    if path := os.environ.get("STREAMAUG_SOAK_JSON"):
        from streamaug.doctor import hardware, installed_versions

        report = {"hardware": hardware(), "versions": installed_versions(), "command": "pytest -m soak", **found}
        Path(path).write_text(json.dumps(report, indent=2) + "\n")


class Watched:
    """Memory of the trainer and its producer, looked at now and then."""

    def __init__(self, stream):
        self.stream = stream
        self.samples: list[tuple[float, float]] = []

    def look(self) -> None:
        self.samples.append((memory_mb(), memory_mb(producers_of(self.stream)[0])))

    def growth(self) -> dict[str, float]:
        """MB: the median of the last quarter less that of the first, for each."""
        quarter = len(self.samples) // 4
        first, last = np.array(self.samples[:quarter]), np.array(self.samples[-quarter:])
        trainer, producer = (np.median(last, axis=0) - np.median(first, axis=0)).round(3).tolist()
        return {"trainer_growth_mb": trainer, "producer_growth_mb": producer}


def assert_flat(growth: dict[str, float]) -> None:
    assert max(growth.values()) < FLAT_MB, growth


def test_a_hundred_kills_at_random_moments_deliver_the_same_images(figures):
    rng = np.random.default_rng(100)
    options = {"seconds": 0.01, "reject": 0.2}
    images, noticed = [], []
    began = time.monotonic()
    with make_stream(producers=2, max_restarts=20, engine_options=options) as stream:
        images += listed(stream, [10])
        while len(noticed) < 100:
            for _ in range(int(rng.integers(1, 12))):
                images += images_of(stream.take(int(rng.integers(1, 20))))
            time.sleep(rng.uniform(0, 0.02))
            restarts, pid = stream.stats().restarts, int(rng.choice(producers_of(stream, 2)))
            os.kill(pid, signal.SIGKILL)
            noticed.append(until(lambda restarts=restarts: stream.stats().restarts > restarts))
        images += listed(stream, [500])
        assert stream.stats().restarts == 100
    assert images == undisturbed([len(images)], engine_options={"reject": 0.2})
    assert statistics.median(noticed) < 1
    figures["kills"] = {
        "kills": len(noticed),
        "images": len(images),
        "different_images": 0,
        "noticed_and_replaced_ms_median": round(1e3 * statistics.median(noticed), 1),
        "noticed_and_replaced_ms_max": round(1e3 * max(noticed), 1),
        "seconds": round(time.monotonic() - began, 1),
    }


def test_a_million_images_leave_memory_flat(figures):
    batch_size, images = 64, 1_000_000
    errors = 0
    with make_stream(engine=FILL, batch_size=batch_size) as stream:
        stream.take(batch_size)
        watched, began = Watched(stream), time.monotonic()
        for k in range(1, images // batch_size + 1):
            batch = stream.take(batch_size)
            wanted = np.arange(k * batch_size, (k + 1) * batch_size)
            errors += not ((batch.ids == wanted).all() and (batch.images == k % 251).all())
            if k % 250 == 0:
                watched.look()
        seconds = time.monotonic() - began
        stats = stream.stats()
    assert errors == 0 and stats.restarts == 0
    assert stats.delivered == stats.fresh_share * stats.delivered >= images
    figures["million"] = {
        "images": stats.delivered,
        "wrong_batches": errors,
        "images_per_second": round(stats.delivered / seconds),
        "seconds": round(seconds, 1),
        "trainer_mb": round(watched.samples[-1][0], 1),
        "producer_mb": round(watched.samples[-1][1], 1),
        **watched.growth(),
    }
    assert_flat(watched.growth())


def test_eight_hours_of_batches_at_an_accelerated_rate_leave_everything_as_it_was(figures):
    """8 h at 10 batches a second are 288,000 batches, here as fast as they come: with feedback after every tenth, a
    new judge after every hundredth and a saved state after every thousandth."""
    batches, size = 8 * 3600 * 10, 8
    judge = np.zeros(1000, np.uint8)
    wrong = 0
    with make_stream(engine=FILL, batch_size=size, judge=judge) as stream:
        stream.take(size)
        stream.state_dict()  # imports torch
        watched, before, began = Watched(stream), footprint(), time.monotonic()
        for k in range(1, batches):
            batch = stream.take(size)
            wrong += batch.ids[0] != k * size or batch.images[-1, 0, 0, 0] != k % 251
            if k % 10 == 0:
                stream.feedback(batch.labels, 1 + 0.1 * batch.labels)
            if k % 100 == 0:
                stream.publish_judge(np.full(1000, k % 256, np.uint8))
            if k % 1000 == 0:
                state = stream.state_dict()
                watched.look()
        seconds = time.monotonic() - began
        stats, after = stream.stats(), footprint()
        assert (stats.delivered, stats.restarts, wrong) == (batches * size, 0, 0)
        assert after == before
    figures["eight_hours"] = {
        "batches": batches,
        "images": stats.delivered,
        "wrong_batches": int(wrong),
        "batches_per_second": round(batches / seconds),
        "seconds": round(seconds, 1),
        "state_json_bytes": len(json.dumps({name: value for name, value in state.items() if name != "tensors"})),
        "judges_in_state": len(state["tensors"]),
        **watched.growth(),
    }
    assert_flat(watched.growth())


def test_a_hundred_openings_leave_nothing(figures):
    with make_stream() as stream:
        stream.take(1)
    before, memory, seconds = footprint(), [], []
    for cycle in range(100):
        began = time.monotonic()
        with make_stream(producers=1 + cycle % 3, memory=("memfd", "shm", "file")[cycle % 3]) as stream:
            stream.take(9)
            pids = producers_of(stream, 1 + cycle % 3)
        seconds.append(time.monotonic() - began)
        until(lambda pids=pids: not any(running(pid) for pid in pids), 2)
        memory.append(memory_mb())
    after = footprint()
    steps = np.diff([np.median(quarter) for quarter in np.array_split(memory, 4)])
    figures["openings"] = {
        "cycles": len(memory),
        "seconds_median": round(statistics.median(seconds), 3),
        "trainer_growth_mb": round(float(steps.sum()), 3),
        "trainer_growth_mb_by_quarter": steps.round(3).tolist(),
        **{f"{name}_growth": getattr(after, name) - getattr(before, name) for name in vars(after)},
    }
    assert after == before
    # Python's allocator takes a megabyte at a time, in whichever quarter it is full; what leaks does so in all of them.
    assert 3 * np.median(steps) < FLAT_MB and steps.sum() < 3 * FLAT_MB

"""The loader over a real stream with a real producer process."""

import os
import signal

import numpy as np
import pytest
import torch
from stream.fakes import producers_of

from streamaug.config import LoaderConfig, Recipe, StreamConfig
from streamaug.loader import StreamLoader
from streamaug.orders import Planner, Schedule
from streamaug.stream.stream import Stream

from .fakes import DIGITS, listed, real_loader


@pytest.fixture
def make_stream():
    streams = []

    def make():
        schedule = Schedule(np.linspace(0, 1, 11), np.linspace(1, 0, 11))
        stream = Stream(
            Planner(np.arange(30) % 10, 10, schedule, [Recipe(kind="noise")], batch_size=6, seed=1),
            engine="loader.engine:build",
            engine_options={},
            image_shape=(1, 8, 8),
            config=StreamConfig(batch_size=6, in_flight=3, backend="process"),
            class_names=DIGITS,
            loader_config=LoaderConfig(ratio=0.5),
        )
        streams.append(stream)
        return stream

    yield make
    for stream in streams:
        stream.close()


def make_loader(stream):
    generator = torch.Generator().manual_seed(2)
    return StreamLoader(real_loader(shuffle=True, generator=generator), stream, with_ids=True)


def test_images_of_the_producer_arrive_with_their_labels_each_once(make_stream):
    stream = make_stream()
    loader = make_loader(stream)
    seen = []
    for images, _, ids in loader:
        made = ids >= 0
        assert torch.allclose(images[made][:, 0, 4, 4], (ids[made] % 200 + 50) / 255)
        seen += ids[made].tolist()
    assert sorted(seen) == list(range(20))
    assert stream.stats().delivered == loader.stats().synthetic == 20


def test_a_resumed_run_and_a_killed_producer_deliver_what_the_uninterrupted_run_does(make_stream):
    whole_loader = make_loader(make_stream())
    whole = [listed(batch) for _ in range(2) for batch in whole_loader]

    stream = make_stream()
    loader = make_loader(stream)
    batches = iter(loader)
    delivered = [listed(next(batches)) for _ in range(2)]
    os.kill(*producers_of(stream), signal.SIGKILL)
    delivered.append(listed(next(batches)))
    state = loader.state_dict()
    stream.close()

    resumed = make_loader(make_stream())
    resumed.load_state_dict(state)
    delivered += [listed(batch) for _ in range(2) for batch in resumed]
    assert delivered == whole


def test_at_ratio_zero_no_producer_starts(make_stream):
    stream = make_stream()
    loader = make_loader(stream)
    loader.ratio = 0
    list(loader)
    assert stream.producer_pids == []

"""The body of the sampling loop over its static buffers, called again and again as a CUDA graph replays it."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, UNet2DModel

from streamaug import engine
from streamaug.config import load
from streamaug.orders import ORDER_DTYPE, OrderBatch
from streamaug.preparation import prepare
from streamaug.sampling import graph
from streamaug.sampling.denoisers import LoadSettings
from streamaug.sampling.denoisers.unet2d import UNet2D
from streamaug.sampling.execution import Execution
from streamaug.sampling.sampler import Sampler

SCHEDULERS = [DDIMScheduler(), DPMSolverMultistepScheduler(), EulerAncestralDiscreteScheduler()]


def sampler(scheduler, **options) -> Sampler:
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
        num_class_embeds=5,
    )
    return Sampler(UNet2D(network, None, LoadSettings(torch.device("cpu"), null_class=4)), scheduler, 6, **options)


def batches() -> list[tuple[torch.Tensor, OrderBatch]]:
    """Batches of different depth, label, noise and guidance, some of them unguided, in no order."""
    made = []
    for k, (start, guidance) in enumerate([(0, 2.0), (3, 2.0), (0, 1.0), (1, 3.0), (3, 1.0), (0, 2.0)]):
        images = np.zeros(3, ORDER_DTYPE)
        images["id"], images["label"] = 3 * k + np.arange(3), (k + np.arange(3)) % 4
        images["guidance"] = guidance * np.array([1.0, 1.5, 1.0 if guidance == 1.0 else 2.0]) ** (guidance > 1)
        made.append(
            (torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(k)), OrderBatch(k, start, 0, 0, images))
        )
    return made


@pytest.fixture
def captured(monkeypatch):
    """Stands in for capturing: the body as it was at its first call, which a replay calls again."""
    bodies = []

    def capture(body, changed, pool):
        bodies.append(body)
        return SimpleNamespace(replay=body)

    monkeypatch.setattr(graph, "capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    return bodies


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda scheduler: type(scheduler).__name__)
def test_replaying_one_body_for_every_step_and_batch_equals_the_plain_loop(scheduler, captured):
    plain, replayed = sampler(scheduler), sampler(scheduler, graph=True)
    for x, order in batches():
        fresh = sampler(scheduler)
        assert torch.equal(replayed.sample(x, order), fresh.sample(x, order))
        assert torch.equal(plain.sample(x, order), fresh.sample(x, order))
    assert len(captured) == 2  # with the unconditional half and without


def test_a_guidance_interval_is_one_body_for_each_change_of_shape(captured):
    options = {"guidance_interval": (0.3, 0.7)}
    replayed = sampler(SCHEDULERS[0], graph=True, **options)
    for x, order in batches():
        assert torch.equal(replayed.sample(x, order), sampler(SCHEDULERS[0], **options).sample(x, order))
    assert len(captured) == 5  # plain to plain, plain to guided and so on, and the unguided batches


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.7)])
def test_after_warming_up_nothing_is_captured_any_more(captured, interval):
    options = {"guidance_interval": interval}
    replayed, heard = sampler(SCHEDULERS[2], graph=True, **options), []
    made = batches()
    for x, order in (made[0], made[2]):  # guided and not, from the beginning
        replayed.warm_up(x, order, on_evaluation=lambda: heard.append(1))
    before = len(captured)
    assert before == len(heard) == (2 if interval == (0.0, 1.0) else 5)
    for x, order in made:
        assert torch.equal(replayed.sample(x, order), sampler(SCHEDULERS[2], **options).sample(x, order))
    assert len(captured) == before


def test_an_engine_warms_up_for_every_kind_of_batch_before_its_first(captured, small_overrides, monkeypatch, caplog):
    prepared = prepare(load("digits", [*small_overrides, "judge.enabled=false"]))
    made = engine.build(prepared.options_for(Execution(graph=True)))
    monkeypatch.setattr(Sampler, "prepares", True)
    warmed = []
    monkeypatch.setattr(Sampler, "warm_up", lambda self, x, order, rows, on_evaluation: warmed.append(len(order)))
    order = prepared.planner.batch(0, prepared.planner.uniform())
    slot = SimpleNamespace(
        **{name: np.zeros(16, np.int64) for name in ("ids", "labels", "source", "scores", "reasons")}
    )
    slot.images, slot.beat = np.zeros((16, 1, 8, 8), np.uint8), lambda: None
    with caplog.at_level(logging.INFO, "streamaug"):
        for _ in range(2):
            made.make(order, slot)
    assert warmed == [16]
    assert [each.getMessage()[:25] for each in caplog.records if "kind 1" in each.message] == [
        "kind 1 of 1 of batches rea"[:25]
    ]


def test_the_buffers_keep_their_address_between_batches(captured):
    replayed = sampler(SCHEDULERS[0], graph=True)
    x, order = batches()[0]
    replayed.sample(x, order)
    (loop,) = replayed._loops.values()
    buffers = [*loop.changed, loop.coef, loop.timesteps, loop.ids, loop.guidance, *loop.conditioning[True].values()]
    before = [buffer.data_ptr() for buffer in buffers]
    for x, order in batches()[1:]:
        replayed.sample(x, order)
    assert before == [buffer.data_ptr() for buffer in buffers]


def test_a_network_that_cannot_be_captured_runs_without_and_says_so_once(monkeypatch, caplog):
    def capture(body, changed, pool):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graph, "capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    replayed = sampler(SCHEDULERS[0], graph=True)
    with caplog.at_level(logging.WARNING, "streamaug"):
        for x, order in batches()[:2]:
            assert torch.equal(replayed.sample(x, order), sampler(SCHEDULERS[0]).sample(x, order))
    assert [record.getMessage()[:42] for record in caplog.records] == ["the network cannot be captured as a CUDA g"]


@pytest.mark.gpu
def test_a_captured_graph_gives_the_bits_of_the_plain_loop():
    for scheduler in SCHEDULERS:
        plain, replayed = sampler(scheduler), sampler(scheduler, graph=True)
        for each in (plain, replayed):
            each.denoiser.network.cuda()
            each.denoiser.device = torch.device("cuda")
        for x, order in batches():
            assert torch.equal(plain.sample(x, order), replayed.sample(x, order))

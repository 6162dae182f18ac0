"""Each framework, alone and with two ranks: what arrives, in which order, and after a stop in mid-epoch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loader.fakes import FakeStream, Images, real_loader
from stream.fakes import running, until
from torch.utils.data.distributed import DistributedSampler

from streamaug.errors import UsageError
from streamaug.loader import StreamLoader

from .runs import BATCH, COUNT, EPOCHS, RUNS, Delivered, interrupted, make_stream

pytestmark = pytest.mark.filterwarnings("ignore")

TESTS = Path(__file__).parent.parent
FRAMEWORKS = list(RUNS)
BATCHES = -(-COUNT // BATCH)


def synthetic_ids(delivered: Delivered) -> list[int]:
    return [number for ids, _ in delivered for number in ids if number >= 0]


def real_indices(delivered: Delivered) -> list[int]:
    return [index for _, indices in delivered for index in indices if index >= 0]


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_half_of_what_arrives_is_synthetic_and_a_resumed_run_delivers_what_the_undisturbed_one_does(name, tmp_path):
    report = interrupted(name, tmp_path)
    whole = report["whole"]
    assert len(whole) == EPOCHS * BATCHES and report["first"] == 4
    assert report["parts"] == whole
    assert sorted(synthetic_ids(whole)) == list(range(len(synthetic_ids(whole))))
    assert len(synthetic_ids(whole)) == pytest.approx(EPOCHS * COUNT / 2, abs=1)
    for epoch in range(EPOCHS):
        indices = real_indices(whole[epoch * BATCHES : (epoch + 1) * BATCHES])
        assert len(set(indices)) == len(indices) and set(indices) <= set(range(COUNT))
    assert len({str(batch[1]) for batch in whole}) == len(whole), "epochs are shuffled anew"
    assert len(report["pids"]) == 1
    until(lambda: not running(report["pids"][0]))


def with_two_ranks(folder: Path, cases: dict[str, dict]) -> list[dict]:
    """Frameworks and their options, under torchrun; the reports of both ranks."""
    arguments = [text for name, options in cases.items() for text in (name, json.dumps(options))]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, TESTS / "integrations" / "runs.py", folder, *arguments],
        capture_output=True,
        text=True,
        timeout=170,
        env={**os.environ, "PYTHONPATH": str(TESTS), "PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[dict]:
    """Of all frameworks at once: importing them is what takes the time."""
    return with_two_ranks(tmp_path_factory.mktemp("ranks"), {name: {} for name in FRAMEWORKS})


@pytest.mark.timeout(200)
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_two_ranks_share_real_images_and_orders_and_each_resumes_where_it_was(name, two_ranks):
    ranks = [report[name] for report in two_ranks]
    for report in ranks:
        assert report["parts"] == report["whole"] and report["first"] == 4
        assert len(report["pids"]) == 1 and not running(report["pids"][0])
    wholes = [report["whole"] for report in ranks]
    per_rank = -(-BATCHES // 2)
    assert [len(whole) for whole in wholes] == [EPOCHS * per_rank] * 2
    ids = [synthetic_ids(whole) for whole in wholes]
    assert not set(ids[0]) & set(ids[1])
    assert {k // 6 % 2 for k in ids[0]} == {0} and {k // 6 % 2 for k in ids[1]} == {1}
    real = [real_indices(whole[:per_rank]) for whole in wholes]
    padding = 2 * per_rank * BATCH - COUNT
    assert len(set(real[0]) & set(real[1])) <= padding
    assert real[0] != real_indices(wholes[0][per_rank : 2 * per_rank]), "set_epoch is honoured"


@pytest.mark.matrix
@pytest.mark.timeout(600)
@pytest.mark.parametrize("stop", range(1, 2 * BATCHES + 1))
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_run_may_stop_after_any_step_of_two_epochs(name, stop, tmp_path):
    report = interrupted(name, tmp_path, stop=stop)
    assert report["parts"] == report["whole"] and report["first"] == stop


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("torch", {"num_workers": 2}),
        ("torch", {"mode": "append"}),
        ("torch", {"displaced": "defer"}),
        ("accelerate", {"mode": "append"}),
        ("accelerate", {"skip": True}),
        ("accelerate", {"split_batches": True}),
        ("accelerate", {"dispatch_batches": True}),
        ("accelerate", {"use_seedable_sampler": True}),
        ("accelerate", {"use_seedable_sampler": True, "data_seed": 3, "use_stateful_dataloader": True}),
        ("lightning", {"combined": True}),
        ("lightning", {"val_check_interval": 2}),
        ("lightning", {"limit_train_batches": 4}),
        ("trainer", {"mixin": True}),
        ("trainer", {"dataloader_num_workers": 2}),
        ("trainer", {"ignore_data_skip": True}),
    ],
)
def test_options_of_the_frameworks_leave_the_resumed_run_exact(name, options, tmp_path):
    report = interrupted(name, tmp_path, **options)
    assert report["parts"] == report["whole"]


@pytest.mark.matrix
@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    "cases",
    [
        {name: {"stop": 2} for name in FRAMEWORKS},
        {name: {"stop": 3} for name in FRAMEWORKS},
        {
            "torch": {"mode": "append", "num_workers": 2},
            "accelerate": {"split_batches": True},
            "lightning": {"limit_train_batches": 2, "stop": 3},
            "trainer": {"gradient_accumulation_steps": 2, "stop": 1},
        },
        {
            "torch": {"displaced": "defer"},
            "accelerate": {"mode": "append", "use_seedable_sampler": True},
            "lightning": {"combined": True},
            "trainer": {"mixin": True, "dataloader_num_workers": 2},
        },
        {"accelerate": {"dispatch_batches": True}, "lightning": {"val_check_interval": 2}},
    ],
)
def test_two_ranks_resume_with_the_options_of_the_frameworks(cases, tmp_path):
    for report in with_two_ranks(tmp_path, cases):
        for name in cases:
            assert report[name]["parts"] == report[name]["whole"], name
            assert not running(report[name]["pids"][0])


@pytest.fixture
def second_of_two(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)


def test_a_rank_whose_stream_was_made_for_one_rank_is_refused(second_of_two):
    with make_stream() as stream:
        loader = StreamLoader(real_loader(), stream, ratio=0.5)
        with pytest.raises(UsageError, match="rank=1, world_size=2"):
            next(iter(loader))


def test_it_is_said_when_every_rank_reads_all_real_images(second_of_two, caplog):
    shared = DistributedSampler(Images(), num_replicas=2, rank=1)
    for options, warned in (({"sampler": shared}, False), ({"shuffle": True}, True), ({}, True)):
        caplog.clear()
        stream = FakeStream(rank=1)
        stream.world_size = 2
        next(iter(StreamLoader(real_loader(**options), stream, ratio=0.5)))
        assert ("DistributedSampler" in caplog.text) == warned, options

"""Each framework, alone and with two ranks: what arrives, in which order, and after a stop in mid-epoch."""

import json
import os
import socket
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

from .runs import BATCH, COUNT, EPOCHS, RUNS, Delivered, interrupted, make_stream, only

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


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def on_two_ranks(folder: Path, cases: list[tuple[str, dict, str | None]], launcher: list[str] | None = None) -> list:
    """What runs.py reports from both ranks; without a launcher they are started here, which is quicker."""
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "PYTHONWARNINGS": "ignore"}
    script = [str(TESTS / "integrations" / "runs.py"), str(folder), json.dumps(cases)]
    if launcher:
        commands = [([*launcher, *script], environment)]
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        commands = [
            ([sys.executable, *script], environment | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in (0, 1)
        ]
    running_now = [
        subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for command, env in commands
    ]
    try:
        for process in running_now:
            _, errors = process.communicate(timeout=170)
            assert process.returncode == 0, errors
    finally:
        for process in running_now:
            process.kill()
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


STOPS = {"more": 4, "fewer": 2}
SEEDED = {"use_seedable_sampler": True, "data_seed": 3}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> tuple[list[dict], dict]:
    """Of all frameworks at once: importing them is what takes the time. And a run that goes from one rank to two and
    one that goes from two to one; of those the parts in this process."""
    folder = tmp_path_factory.mktemp("ranks")
    here = {"more": only("accelerate", folder / "more", 0, 1, stop=STOPS["more"], **SEEDED)}
    cases: list = [(name, {}, None) for name in FRAMEWORKS]
    cases += [("accelerate", {"resume": True, **SEEDED}, "more")]
    cases += [("accelerate", {"stop": STOPS["fewer"], **SEEDED}, "fewer")]
    reports = on_two_ranks(folder, cases)
    here["fewer"] = only("accelerate", folder / "fewer", 0, 1, resume=True, **SEEDED)
    return reports, here


@pytest.mark.timeout(200)
@pytest.mark.parametrize(("part", "before", "after"), [("more", 1, 2), ("fewer", 2, 1)])
def test_accelerate_goes_on_with_another_number_of_ranks(part, before, after, two_ranks):
    """An epoch begun by one number of ranks is ended by another: every batch of real images is read once."""
    reports, here = two_ranks
    runs = {1: [here[part]], 2: [report[part] for report in reports]}
    left = (BATCHES - STOPS[part] * before) // after
    assert [len(run) for run in runs[before]] == [STOPS[part]] * before
    assert [len(run) for run in runs[after]] == [left + (EPOCHS - 1) * BATCHES // after] * after
    real = [index for run in [*runs[before], *(run[:left] for run in runs[after])] for index in real_indices(run)]
    repeated = BATCHES * BATCH - COUNT if after == 2 else 0  # Accelerate fills the last batch of several ranks
    assert len(real) - len(set(real)) <= repeated and len(real) >= COUNT // 2
    ids = [number for run in (*runs[before], *runs[after]) for number in synthetic_ids(run)]
    assert len(set(ids)) == len(ids)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_two_ranks_share_real_images_and_orders_and_each_resumes_where_it_was(name, two_ranks):
    ranks = [report[name] for report in two_ranks[0]]
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
        ("accelerate", {"displaced": "defer"}),
        ("accelerate", {"displaced": "defer", "stop": 10}),
        ("accelerate", {"displaced": "defer", "use_seedable_sampler": True, "use_stateful_dataloader": True}),
        ("accelerate", {"even_batches": False}),
        ("accelerate", {"skip": True}),
        ("accelerate", {"split_batches": True}),
        ("accelerate", {"dispatch_batches": True}),
        ("accelerate", {"use_seedable_sampler": True}),
        ("accelerate", {"use_seedable_sampler": True, "data_seed": 3, "use_stateful_dataloader": True}),
        ("lightning", {"combined": True}),
        ("lightning", {"val_check_interval": 2}),
        ("lightning", {"limit_train_batches": 4}),
        ("lightning", {"displaced": "defer"}),
        ("trainer", {"mixin": True}),
        ("trainer", {"displaced": "defer"}),
        ("trainer", {"dataloader_num_workers": 2}),
        ("trainer", {"ignore_data_skip": True}),
        ("trainer", {"max_steps": 7}),
        ("trainer", {"dataloader_drop_last": True}),
        ("trainer", {"gradient_accumulation_steps": 2, "stop": 2}),
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
        {name: {"stop": 3} for name in FRAMEWORKS} | {"accelerate": {"stop": 3, "skip": True}},
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
        {"accelerate": {"dispatch_batches": True}, "lightning": {"val_check_interval": 2}, "trainer": {"max_steps": 5}},
        {"accelerate": {"even_batches": False, "stop": 2}, "trainer": {"dataloader_drop_last": True, "stop": 2}},
        {"accelerate": {"displaced": "defer"}, "lightning": {"displaced": "defer"}, "trainer": {"displaced": "defer"}},
        {"accelerate": {"displaced": "defer", "split_batches": True, "stop": 2}},
        {"accelerate": {"use_seedable_sampler": True, "data_seed": 3, "use_stateful_dataloader": True}},
    ],
)
def test_two_ranks_resume_with_the_options_of_the_frameworks(cases, tmp_path):
    for report in on_two_ranks(tmp_path, [(name, options, None) for name, options in cases.items()], TORCHRUN):
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

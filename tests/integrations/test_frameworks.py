"""Each framework, alone and with two ranks: what arrives, in which order, and after a stop in mid-epoch."""

import contextlib
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

from .runs import BATCH, COUNT, EPOCHS, RUNS, Delivered, interrupted, make_stream, only

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(500)]  # importing them all takes long

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
        # They meet at a store of this process, as at that of torchrun's agent: a port that is only known to be free may
        # be another's a moment later.
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        group = {
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        commands = [
            ([sys.executable, *script], environment | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in (0, 1)
        ]
    started = []
    try:
        for number, (command, env) in enumerate(commands):
            with open(folder / f"errors{number}", "w") as errors:  # a pipe would have to be read meanwhile
                started.append(subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=errors))
        with contextlib.suppress(subprocess.TimeoutExpired):
            for process in started:
                process.wait(400)
    finally:
        for process in started:
            process.kill()
            process.wait()
    errors_of = "".join((folder / f"errors{number}").read_text() for number in range(len(started)))
    assert [process.returncode for process in started] == [0] * len(started), errors_of
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


SEEDED = {"use_seedable_sampler": True, "data_seed": 3}
GATHERED = {"gather": True, "stateful": True}
# Options of a run's beginning and of its rest. Steps of the Trainer stay those of an epoch.
MORE = {  # from one rank to two
    "torch": (GATHERED | {"stop": 4}, GATHERED),
    "accelerate": (SEEDED | {"stop": 3}, SEEDED),
    "lightning": ({"stop": 4, "any_ranks": True}, {}),
    "trainer": ({"stop": 2, "batch_size": 2 * BATCH}, {}),
}
FEWER = {  # from two ranks to one
    "torch": (GATHERED | {"stop": 2}, GATHERED),
    "accelerate": (SEEDED | {"stop": 2}, SEEDED),
    "lightning": ({"stop": 2}, {}),
    "trainer": ({"stop": 2}, {"gradient_accumulation_steps": 2}),
}
EVERY = {"mode": "append"}  # no real image makes room: each can be counted
Runs = dict[str, dict[int, list[Delivered]]]  # a part's name -> ranks -> what arrived on each


def with_other_ranks(folder: Path, parts: dict, cases: list | None = None) -> tuple[Runs, list[dict]]:
    """Runs that begin with one number of ranks and end with another, on two ranks in one launch.

    parts: name -> (framework, ranks before, options of the beginning, options of the rest). Also what runs.py reports
    of `cases`.
    """
    here, there = {}, list(cases or [])
    for part, (name, before, beginning, rest) in parts.items():
        if before == 1:
            here[part] = only(name, folder / part, 0, 1, **beginning)
        there.append((name, beginning if before == 2 else rest | {"resume": True}, part))
    reports = on_two_ranks(folder, there)
    for part, (name, before, _, rest) in parts.items():
        if before == 2:
            here[part] = only(name, folder / part, 0, 1, resume=True, **rest)
    return {part: {1: [here[part]], 2: [report[part] for report in reports]} for part in parts}, reports


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> tuple[list[dict], Runs, Path]:
    """Of all frameworks at once: importing them is what takes the time."""
    folder = tmp_path_factory.mktemp("ranks")
    parts = {f"{name} more": (name, 1, EVERY | MORE[name][0], EVERY | MORE[name][1]) for name in FRAMEWORKS}
    parts |= {f"{name} fewer": (name, 2, EVERY | FEWER[name][0], EVERY | FEWER[name][1]) for name in FRAMEWORKS}
    others: list = [(name, {}, None) for name in FRAMEWORKS] + [("trainer", EVERY | {"stop": 4}, "steps")]
    runs, reports = with_other_ranks(folder, parts, others)
    return reports, runs, folder


def check_each_image_once(
    runs: dict[int, list[Delivered]], before: int, per_epoch: int, padded: int, per_epoch_after: int | None = None
) -> None:
    """Every real image once in the epoch in which the ranks changed and in each after it, every synthetic one once in
    all, and as many batches on each rank.

    per_epoch: batches on each of the ranks `before`. padded: images that fill the last batches of several ranks. What
    the new ranks cannot share out evenly is passed over: it is less than a step of theirs.
    """
    after, stop = 3 - before, len(runs[before][0])
    per_epoch_after = per_epoch_after or -(-BATCHES // after)
    begun = (stop - 1) // per_epoch  # epochs before the one in which the ranks changed
    done = stop - begun * per_epoch
    left = per_epoch_after - -(-done * per_epoch_after // per_epoch)
    assert [len(run) for run in runs[before]] == [stop] * before
    assert [len(run) for run in runs[after]] == [left + (EPOCHS - 1 - begun) * per_epoch_after] * after
    epochs = [[*(run[begun * per_epoch :] for run in runs[before]), *(run[:left] for run in runs[after])]]
    for first in range(left, len(runs[after][0]), per_epoch_after):
        epochs.append([run[first : first + per_epoch_after] for run in runs[after]])
    read = min(done * (BATCHES // per_epoch) * BATCH, COUNT)
    passed = min((per_epoch_after - left) * (BATCHES // per_epoch_after) * BATCH, COUNT) - read
    for epoch, missing in zip(epochs, [passed, *[0] * len(epochs[1:])], strict=True):
        real = [index for run in epoch for index in real_indices(run)]
        assert len(set(real)) == COUNT - missing and len(real) - len(set(real)) <= padded
    ids = [number for run in (*runs[before], *runs[after]) for number in synthetic_ids(run)]
    assert len(set(ids)) == len(ids)


PADDED = 2 * -(-BATCHES // 2) * BATCH - COUNT  # by Accelerate, which fills the last batch of several ranks


def per_epoch(name: str, before: int) -> int:
    return BATCHES // 2 if before == 2 or name == "trainer" else BATCHES


@pytest.mark.parametrize(("change", "before"), [("more", 1), ("fewer", 2)])
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_run_goes_on_with_another_number_of_ranks(name, change, before, two_ranks):
    check_each_image_once(two_ranks[1][f"{name} {change}"], before, per_epoch(name, before), PADDED)


def test_where_an_epoch_has_more_steps_than_before_the_trainer_goes_on_elsewhere_and_it_is_said(two_ranks, caplog):
    """After 4 steps of 3 an epoch on two ranks, one rank goes on at batch 4 of 6 of the first epoch."""
    reports, _, folder = two_ranks
    rest = only("trainer", folder / "steps", 0, 1, resume=True, **EVERY)
    assert len(rest) == EPOCHS * BATCHES - 4
    first = [index for report in reports for index in real_indices(report["steps"][:2])]
    assert set(first) | set(real_indices(rest[:2])) == set(range(COUNT)), "the two batches of epoch 0 come again"
    for epoch in range(2):
        assert sorted(real_indices(rest[2 + epoch * BATCHES : 2 + (epoch + 1) * BATCHES])) == list(range(COUNT))
    ids = [number for run in (rest, *(report["steps"] for report in reports)) for number in synthetic_ids(run)]
    assert len(set(ids)) == len(ids)
    said = [record.getMessage() for record in caplog.records if "counts optimizer steps" in record.msg]
    assert len(said) == 1 and "batch 2 of epoch 1" in said[0] and "goes on at batch 4 of epoch 0" in said[0]


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_two_ranks_share_real_images_and_orders_and_each_resumes_where_it_was(name, two_ranks):
    ranks = [report[name] for report in two_ranks[0]]
    for report in ranks:
        assert report["parts"] == report["whole"] and report["first"] == 4
        assert len(report["pids"]) == 1
        until(lambda pid=report["pids"][0]: not running(pid))
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
        ("trainer", {"max_steps": 14, "iterable": True, "stop": 8}),
        ("trainer", {"dataloader_drop_last": True}),
        ("trainer", {"gradient_accumulation_steps": 2, "stop": 2}),
    ],
)
def test_options_of_the_frameworks_leave_the_resumed_run_exact(name, options, tmp_path):
    report = interrupted(name, tmp_path, **options)
    assert report["parts"] == report["whole"]


@pytest.mark.matrix
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
            until(lambda pid=report[name]["pids"][0]: not running(pid))


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


def grid(name: str, before: int) -> dict:
    """Every step of two epochs."""
    beginning, rest = (MORE if before == 1 else FEWER)[name]
    return {
        f"{before}, {stop}": (name, before, EVERY | beginning | {"stop": stop}, EVERY | rest)
        for stop in range(1, 2 * per_epoch(name, before) + 1)
    }


@pytest.mark.matrix
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_the_number_of_ranks_may_change_after_any_step_of_two_epochs(name, tmp_path):
    parts = grid(name, 1) | grid(name, 2)
    runs, _ = with_other_ranks(tmp_path, parts)
    for part, (_, before, _, _) in parts.items():
        check_each_image_once(runs[part], before, per_epoch(name, before), PADDED)


@pytest.mark.matrix
def test_the_number_of_ranks_may_change_with_the_options_of_the_frameworks(tmp_path):
    options = [
        ("torch", {"stateful": False, "num_workers": 2}),
        ("torch", {"num_workers": 2}),
        ("accelerate", {"split_batches": True}),
        ("accelerate", {"dispatch_batches": True}),
        ("accelerate", {"use_stateful_dataloader": True}),
        ("accelerate", {"skip": True}),
        ("lightning", {"val_check_interval": 2}),
        ("lightning", {"combined": True}),
        ("trainer", {"mixin": True, "dataloader_num_workers": 2}),
    ]
    parts = {
        f"{number}, {before}": (name, before, EVERY | of[name][0] | chosen, EVERY | of[name][1] | chosen)
        for before, of in ((1, MORE), (2, FEWER))
        for number, (name, chosen) in enumerate(options)
    }
    runs, _ = with_other_ranks(tmp_path, parts)
    for part, (name, before, beginning, _) in parts.items():
        split = [BATCHES, PADDED, BATCHES] if beginning.get("split_batches") else [per_epoch(name, before), PADDED]
        check_each_image_once(runs[part], before, *split)


@pytest.mark.matrix
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_images_that_were_held_back_are_dealt_out_to_another_number_of_ranks(name, tmp_path):
    defer = {"displaced": "defer"}
    parts = {
        f"{before}, {stop}": (name, before, of[name][0] | defer | {"stop": stop}, of[name][1] | defer)
        for before, of in ((1, MORE), (2, FEWER))
        for stop in (3, 4)
    }
    runs, _ = with_other_ranks(tmp_path, parts)
    for part, (_, before, _, _) in parts.items():
        after = 3 - before
        runs_after = runs[part][after]
        assert len({len(run) for run in runs_after}) == 1
        length = 6 if after == 2 else 11  # of 43 images, 4 in a batch
        left = len(runs_after[0]) - (EPOCHS - 1) * length
        epochs = [[*runs[part][before], *(run[:left] for run in runs_after)]]
        epochs += [[run[left + first : left + first + length] for run in runs_after] for first in (0, length)]
        for epoch, step in zip(epochs, [after * BATCH, 0, 0], strict=True):
            real = [index for run in epoch for index in real_indices(run)]
            assert len(set(real)) >= COUNT - step and len(real) - len(set(real)) <= PADDED
        ids = [number for run in (*runs[part][1], *runs[part][2]) for number in synthetic_ids(run)]
        assert len(set(ids)) == len(ids)


@pytest.mark.matrix
def test_limited_epochs_of_lightning_stay_as_long_for_each_rank(tmp_path):
    """An epoch of two batches on each of two ranks, left after one, is over for one rank: it has read two."""
    limit = {"limit_train_batches": 2}
    parts = {"over": ("lightning", 2, EVERY | limit | {"stop": 1}, EVERY | limit)}
    parts["begun"] = ("lightning", 1, EVERY | limit | {"stop": 1, "any_ranks": True}, EVERY | limit)
    runs, _ = with_other_ranks(tmp_path, parts)
    assert len(runs["over"][1][0]) == 2 * (EPOCHS - 1)
    assert [len(run) for run in runs["begun"][2]] == [1 + 2 * (EPOCHS - 1)] * 2

"""Ranks of one machine that share their producers: real processes, real signals, a real process group."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from streamaug.config import load
from streamaug.errors import ConfigError, StreamaugError, UsageError
from streamaug.stream import ranks as ranks_module
from streamaug.stream import stream
from streamaug.stream.dispatch import Dispatch
from streamaug.stream.footprint import children, footprint, running
from streamaug.stream.producer import End, Maker
from streamaug.stream.producers import fleet, sharing, sockets
from streamaug.stream.producers.fleet import Fleet
from streamaug.stream.producers.placement import Sides, choose
from streamaug.stream.ranks import Meeting
from streamaug.stream.ring import Layout, Ring, cuda
from streamaug.stream.ring.emission import Emission
from streamaug.stream.ring.memory import Memory

from .double import DoubleCuda, calls, lay_out
from .fakes import (
    IMAGE_SHAPE,
    assert_given_back,
    at_some_pace,
    descriptors_left,
    images_of,
    make_planner,
    make_stream,
    producers_of,
    undisturbed,
    until,
)

LIVE = np.zeros(16, np.uint8)
fork = multiprocessing.get_context("fork")  # what they import is here already


class Failed(Exception):
    """What a rank raised."""


class Rank:
    """A trainer in a process of its own, which does what it is told."""

    def __init__(self, rank: int, folder: Path, options: dict[str, Any]):
        self.pipe, theirs = fork.Pipe()
        self.process = fork.Process(target=_train, args=(rank, folder, theirs, options), daemon=True)
        self.process.start()
        theirs.close()

    def begin(self, action: str, *arguments: Any) -> None:
        self.pipe.send((action, arguments))

    def end(self, seconds: float = 90.0) -> Any:
        assert self.pipe.poll(seconds), "it does not answer"
        value, error = self.pipe.recv()
        if error is not None:
            raise Failed(error)
        return value

    def do(self, action: str, *arguments: Any) -> Any:
        self.begin(action, *arguments)
        return self.end()

    def take(self, *numbers: int) -> list[tuple]:
        return self.do("take", *numbers)

    @property
    def host(self) -> int:
        """Of the only producer; none is known until a new one has answered."""
        pids: list[int] = []
        until(lambda: pids.extend(self.do("pids")) or pids != [])
        (pid,) = pids
        return pid

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def _train(rank: int, folder: Path, pipe: Any, options: dict[str, Any]) -> None:
    os.setsid()
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    before = footprint()
    trained = None
    actions = {
        "take": lambda *numbers: [image for n in numbers for image in images_of(trained.take(n))],
        "pids": lambda: trained.producer_pids,
        "keeps": lambda: trained._fleet._sharing.keeps,
        "start": lambda: trained.start(),
        "publish": lambda byte: trained.publish_judge(np.full(16, byte, np.uint8)),
        "feedback": lambda *given: trained.feedback(*given),
        "state": lambda: trained.state_dict(),
        "load": lambda state: trained.load_state_dict(state),
        "stats": lambda: trained.stats(),
        "rate": lambda: trained.rate,
        "started at": lambda: trained.started_at,
        "replan": lambda first_k: trained.replan(first_k=first_k),
        "fork": _fork,
        "close": lambda: trained.close(),
        "is as before": lambda: assert_given_back(before) is None,
    }
    while True:
        try:
            action, arguments = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            if trained is None:
                trained = make_stream(rank=rank, world_size=2, **{"shared": True} | options)
            answer = actions[action](*arguments), None
        except BaseException as error:
            answer = None, f"{type(error).__name__}: {error}"
        pipe.send(answer)


def _fork() -> int:
    pid = os.fork()
    if pid == 0:
        time.sleep(120)
        os._exit(0)
    return pid


class Ranks(list[Rank]):
    @property
    def keeper_and_other(self) -> tuple[Rank, Rank]:
        """Both have started."""
        one, other = self
        return (one, other) if one.do("keeps") else (other, one)

    def begin(self, action: str, *arguments: Any) -> None:
        for rank in self:
            rank.begin(action, *arguments)

    def take(self, *numbers: int) -> list[list[tuple]]:
        """At the same time."""
        self.begin("take", *numbers)
        return [rank.end() for rank in self]


@pytest.fixture
def ranks(tmp_path) -> Iterator[Any]:
    began: list[Rank] = []

    def begin(*, of_rank: dict[int, dict] | None = None, **options: Any) -> Ranks:
        folder = tmp_path / str(len(began))
        folder.mkdir()
        ranks = Ranks(Rank(at, folder, options | (of_rank or {}).get(at, {})) for at in range(2))
        began.extend(ranks)
        return ranks

    yield begin
    for rank in began:
        rank.kill()


def alone(takes: list[int], **options: Any) -> list[list[tuple]]:
    return [undisturbed(takes, rank=at, world_size=2, **options) for at in range(2)]


def programs(of: int) -> list[int]:
    """The process and all that it started, and what those started."""
    return [of, *(pid for child in children(of) for pid in programs(child))]


def rings(pid: int) -> int:
    """How many blocks of a ring's memory a host maps, besides its pulse."""
    return Path(f"/proc/{pid}/maps").read_text().count("memfd:streamaug ") - 1


# What is shared, and that nobody notices.


@pytest.mark.parametrize(("method", "besides"), [("spawn", 0), ("forkserver", 1)])
def test_one_process_makes_the_images_of_both_ranks_as_two_would(ranks, method, besides):
    both = ranks(start_method=method, engine_options={"reject": 0.2})
    assert both.take(30, 5, 40) == alone([75], engine_options={"reject": 0.2})
    keeper, other = both.keeper_and_other
    host = keeper.host
    assert other.host == host
    started = programs(keeper.process.pid)
    assert len(started) == 2 + besides and host in started, "it, and what it is a copy of"
    assert programs(other.process.pid) == [other.process.pid]
    assert rings(host) == 2
    for rank in (*both, *both):
        rank.do("close")
    assert all(rank.do("is as before") for rank in both)
    until(lambda: not running(host))


def test_two_shared_producers_are_two_processes(ranks):
    both = ranks(producers=2)
    assert both.take(60) == alone([60])
    until(lambda: all(len(set(rank.do("pids"))) == 2 for rank in both))
    one, other = (rank.do("pids") for rank in both)
    assert one == other


def test_each_rank_is_judged_by_its_own_states_and_steered_by_its_own_losses(ranks):
    def run(take, publish, feedback, rank) -> list[tuple]:
        images = []
        for step in range(8):
            images += take(12)
            publish(10 * step + rank)  # the same versions, other states
            labels = np.array([image[1] for image in images[-12:]])
            feedback(labels, 1.0 + labels * (step % 3) * (1 + rank))
        return images

    both = ranks(judge=LIVE)
    for rank in both:
        rank.do("start")
    found: list[list[tuple]] = [[], []]
    for step in range(8):
        for at, images in enumerate(both.take(12)):
            found[at] += images
            both[at].do("publish", 10 * step + at)
            labels = np.array([image[1] for image in images])
            both[at].do("feedback", labels, 1.0 + labels * (step % 3) * (1 + at))
    for at in range(2):
        with make_stream(judge=LIVE, backend="local", rank=at, world_size=2) as stream:
            expected = run(
                lambda n, stream=stream: images_of(stream.take(n)),
                lambda byte, stream=stream: stream.publish_judge(np.full(16, byte, np.uint8)),
                stream.feedback,
                at,
            )
        assert found[at] == expected


def test_both_ranks_go_on_where_they_were(ranks):
    first = ranks()
    begun = first.take(21)
    states = [rank.do("state") for rank in first]
    for rank in first:
        rank.kill()
    then = ranks()
    for rank, state in zip(then, states, strict=True):
        rank.do("load", state)
    assert [one + other for one, other in zip(begun, then.take(30), strict=True)] == alone([51])


def test_a_rank_that_waits_does_not_take_the_other_ones_long_batch_for_a_hang(ranks):
    def check(pace: float) -> None:
        options = {"slow_every": 8, "slow_seconds": 1.0 * pace}
        both = ranks(engine_options=options, stall_timeout=0.1 * pace, hang_timeout=0.4 * pace)
        assert both.take(40) == alone([40])
        assert [rank.do("stats").restarts for rank in both] == [0, 0]

    at_some_pace(check)


def test_ranks_take_turns_and_the_rate_is_each_ones_part(ranks):
    def check(pace: float) -> None:
        most = 8 / (0.02 * pace) / 2
        both = ranks(engine_options={"seconds": 0.02 * pace})
        both.take(160)
        began = []
        for at, rank in enumerate(both):
            assert 0.5 * most < rank.do("rate") < most
            start, stats = rank.do("started at"), rank.do("stats")
            began += [(start + batch[0], at) for batch in stats.timeline]
            assert "with this rank's images" in stats.limit or stats.limit.startswith("the producer limits")
        turns = [at for _, at in sorted(began)][4:-8]
        changes = sum(one != other for one, other in itertools.pairwise(turns))
        assert changes > 0.7 * len(turns), turns
        one, other = both
        other_host = other.host
        one.do("close")
        until(lambda: other.do("rate") > most and running(other_host), 5)

    at_some_pace(check)


# Faults.


def test_a_killed_host_is_replaced_for_both_and_images_are_the_same(ranks):
    both = ranks(engine_options={"seconds": 0.005})
    images: list[list[tuple]] = [[], []]
    for kill in range(4):
        for at, taken in enumerate(both.take(40)):
            images[at] += taken
        host = both[0].host
        both.begin("take", 20)
        time.sleep(0.01 * kill)
        os.kill(host, signal.SIGKILL)
        for at, rank in enumerate(both):
            images[at] += rank.end()
    assert images == alone([240])
    until(lambda: [rank.do("stats").restarts for rank in both] == [4, 4])
    until(lambda: both[0].host == both[1].host)


def test_a_rank_with_nothing_to_be_made_outlives_any_number_of_hosts(ranks):
    both = ranks(max_restarts=1)
    both.take(8)
    keeper, other = both.keeper_and_other
    for made in (1, 2, 3):
        until(lambda: other.do("stats").ring_fill >= 0.75)
        keeper.take(40)
        os.kill(keeper.host, signal.SIGKILL)
        until(lambda made=made: [rank.do("stats").restarts for rank in both] == [made, made])
        until(lambda: other.do("pids") == keeper.do("pids"))
    assert other.take(40) == alone([48])[both.index(other)][8:]


@pytest.mark.parametrize("point", ["before_ready:0", "mid_write:2", "before_publish:1"])
def test_a_host_killed_at_this_point_makes_the_same_images(ranks, point, monkeypatch):
    monkeypatch.setenv("STREAMAUG_FAULT", point)
    assert ranks(judge=LIVE).take(50) == alone([50], judge=LIVE)


def test_a_stopped_host_is_replaced(ranks, tmp_path):
    both = ranks(engine_options={"stop_at": 4, "once": str(tmp_path / "stopped")}, stall_timeout=0.2, hang_timeout=0.5)
    assert both.take(60) == alone([60])


@pytest.mark.parametrize("forked", [False, True])
def test_when_the_other_rank_is_killed_its_memory_is_given_back_and_the_keeper_goes_on(ranks, forked):
    """Also where a DataLoader's worker, say, still holds its descriptors."""
    both = ranks()
    both.take(20)
    keeper, other = both.keeper_and_other
    host = keeper.host
    child = other.do("fork") if forked else None
    other.kill()
    until(lambda: rings(host) == 1, 2)
    assert keeper.take(30) == alone([50])[both.index(keeper)][20:]
    assert keeper.host == host and keeper.do("stats").restarts == 0
    if child is not None:
        assert running(child)
        os.kill(child, signal.SIGKILL)


def test_a_long_batch_of_a_killed_rank_is_not_made_to_its_end(ranks):
    both = ranks(engine_options={"slow_every": 11, "slow_seconds": 60})
    for rank in both:
        rank.do("replan", 1)
    both.take(8)
    until(lambda: both[0].do("stats").ring_fill >= 0.75)  # what it takes while batch 11 is made
    both[1].begin("take", 48)  # up to batch 11
    assert len(both[0].take(24)) == 24
    time.sleep(0.2)
    keeper, host = both[0].do("keeps"), both[0].host
    both[1].kill()
    if keeper:
        until(lambda: rings(host) == 1, 2)
        assert [image[0] // 8 for image in both[0].take(24)[::8]] == [10, 12, 14]
    else:
        until(lambda: not running(host), 2)


@pytest.mark.parametrize("forked", [False, True])
def test_when_the_keeper_is_killed_the_host_ends_and_the_other_is_told_who_it_was(ranks, forked):
    both = ranks()
    both.take(8)
    keeper, other = both.keeper_and_other
    host = keeper.host
    child = keeper.do("fork") if forked else None
    other.begin("take", 10**6)
    time.sleep(0.1)
    keeper.kill()
    until(lambda: not running(host), 2)
    with pytest.raises(Failed, match=rf"ProducerError: .* kept by rank \d \(process {keeper.process.pid}\), which has"):
        other.end(10)
    if child is not None:
        assert running(child)
        os.kill(child, signal.SIGKILL)


def test_when_the_keeper_closes_first_the_others_are_served_to_their_end(ranks):
    both = ranks()
    begun = both.take(20)
    keeper, other = both.keeper_and_other
    host = keeper.host
    keeper.do("close")
    at = both.index(other)
    assert begun[at] + other.take(60) == alone([80])[at]
    assert running(host)
    other.do("close")
    until(lambda: not running(host), 2)
    assert keeper.do("is as before")


def test_a_host_that_hangs_when_the_last_one_leaves_is_ended(ranks, monkeypatch):
    class Impatient(sharing.Sharing):
        def __init__(self, meeting, config):
            super().__init__(meeting, config)
            self.silence = 2.0  # but not with its start

    monkeypatch.setattr(fleet, "Sharing", Impatient)
    both = ranks()
    both.take(20)
    keeper, _ = both.keeper_and_other
    host = keeper.host
    stopped = time.monotonic()
    os.kill(host, signal.SIGSTOP)
    for rank in both:
        rank.do("close")
    assert running(host) or time.monotonic() - stopped > 1.5
    until(lambda: not running(host), 4)
    assert keeper.do("is as before")


def test_when_the_keeper_is_gone_and_then_the_host_the_others_are_told(ranks):
    both = ranks()
    both.take(20)
    keeper, other = both.keeper_and_other
    keeper.do("close")
    os.kill(other.host, signal.SIGKILL)
    with pytest.raises(Failed, match="ended, failed or closed its stream"):
        other.take(10**6)


def test_an_exception_of_the_engine_reaches_both_with_its_traceback(ranks):
    both = ranks(engine_options={"raise_at": 60, "seconds": 0.01})  # beyond what is in flight for take(1)
    both.take(1)
    both.begin("take", 1000)
    for rank in both:
        with pytest.raises(Failed, match=r"RuntimeError in batch 60: the weights are rotten[^$]*in make"):
            rank.end()


def test_a_rank_that_comes_after_an_exception_is_told_of_it_too(ranks):
    one, other = ranks(engine_options={"refuse": "NaN in the weights"})
    for rank in (one, other):
        with pytest.raises(Failed, match="ModelError: NaN in the weights"):
            rank.take(1)


def test_a_host_that_cannot_live_ends_both(ranks):
    both = ranks(engine_options={"die_at_start": True}, max_restarts=1)
    both.begin("take", 1)
    errors = []
    for rank in both:
        with pytest.raises(Failed) as error:
            rank.end()
        errors.append(str(error.value))
    assert any("what I last wanted to say" in error for error in errors)
    assert any("which has ended, failed or closed its stream" in error for error in errors)


# Where a GPU is set aside for the producers.


@pytest.mark.parametrize("trainer", ["cpu", "cuda"])
def test_the_host_pins_the_rings_of_both_ranks_and_unpins_that_of_one_that_leaves(
    ranks, trainer, tmp_path, monkeypatch
):
    class Placed(Fleet):
        def __init__(self, config, backend, layout, judge_nbytes, work, **options):
            work = replace(work, device="cuda", environment={})
            super().__init__(config, backend, layout, judge_nbytes, work, **(options | {"trainer_device": trainer}))

    expected = alone([40])
    monkeypatch.setattr(cuda, "PROVIDER", f"{__package__}.double:DoubleCuda")
    monkeypatch.setenv("STREAMAUG_DOUBLE", str(tmp_path))
    monkeypatch.setattr(stream, "Fleet", Placed)
    lay_out(tmp_path)
    both = ranks()
    assert both.take(40) == expected
    keeper, other = both.keeper_and_other
    host = keeper.host

    def done(name: str) -> list[int]:
        return [pid for pid, called, _ in calls(tmp_path) if called == name and pid == host]

    assert len(done("register")) == 2 and not done("unregister")
    other.do("close")
    until(lambda: len(done("unregister")) == 1)


def test_memory_of_a_gpu_is_not_shared_with_producers_that_do_not_see_every_ranks(tmp_path, monkeypatch):
    monkeypatch.setenv("STREAMAUG_DOUBLE", str(tmp_path))
    lay_out(tmp_path)
    sides = Sides("process", ("cuda",), "cuda:0", shared=True)
    assert choose("auto", sides, DoubleCuda()) == "pinned"
    with pytest.raises(UsageError, match=r"do not see every rank's GPU; auto and pinned work"):
        choose("cuda", sides, DoubleCuda())


def test_memory_of_a_rank_that_left_is_not_given_back_before_the_device_has_written_to_it():
    class Written(Emission):
        def __init__(self) -> None:
            self.looks = 0

        def done(self) -> bool:
            self.looks += 1
            end.deserted = self.looks > 2
            return self.looks > 5

    class Engine:
        image_shape, stage_seconds = IMAGE_SHAPE, {}

        def make(self, order, slot) -> Written:
            return made

    made, layout = Written(), Layout(8, IMAGE_SHAPE, 1)
    ring = Ring(Memory.create("private", layout.nbytes), layout)
    ring.issue(make_planner(8).batch(0, make_planner(8).uniform()))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        end = End(ring, None, theirs)
        Maker(Engine()).make(end)
    assert made.looks == 6 and ring.slot(0).abandoned


# What is refused.


@pytest.mark.parametrize(
    ("differs", "words"),
    [
        ({"threads": 2}, r"UsageError: stream.threads is 2 on this rank and 1 on the rank that keeps"),
        ({"producers": 2}, r"UsageError: stream.producers is 2 on rank 1 and 1 on rank 0, which keeps"),
    ],
)
def test_ranks_that_want_different_producers_are_refused(ranks, differs, words):
    one, other = ranks(of_rank={1: differs})
    one.take(1)
    with pytest.raises(Failed, match=words):
        other.take(1)
    one.take(20)


def test_nothing_is_made_for_a_rank_that_was_refused_however_late_it_looks(ranks, monkeypatch):
    def issue_and_stall(self: Dispatch) -> None:
        issue(self)
        time.sleep(0.5)

    issue = Dispatch.issue
    monkeypatch.setattr(Dispatch, "issue", issue_and_stall)
    one, other = ranks(of_rank={1: {"threads": 2}})
    one.take(1)
    with pytest.raises(Failed, match=r"UsageError: stream.threads is 2 on this rank"):
        other.take(1)


def test_ranks_without_a_process_group_are_refused():
    with pytest.raises(UsageError, match=r"stream.shared needs torch's default process group"):
        make_stream(shared=True, rank=0, world_size=2)


def test_the_nth_streams_of_a_plan_meet_on_one_machine(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda store=dist.HashStore(): store)

    def meetings(rank: int) -> list[Meeting]:
        """Those of a process of its own."""
        ranks_module._opened.clear()
        return [Meeting(plan, rank) for plan in ("training", "training", "validation")]

    here, there = meetings(0), meetings(1)
    assert [meeting.agree(f"0: {at}") for at, meeting in enumerate(here)] == ["0: 0", "0: 1", "0: 2"]
    assert [meeting.agree(f"1: {at}") for at, meeting in enumerate(there)] == ["0: 0", "0: 1", "0: 2"]
    monkeypatch.setattr(ranks_module, "_machine", lambda: "another")
    assert [meeting.agree("2") for meeting in meetings(2)] == ["2", "2", "2"]


@pytest.fixture
def in_a_group(monkeypatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda store=dist.HashStore(): store)


def test_two_shared_streams_meet_by_their_plans_in_whatever_order_ranks_make_and_start_them(in_a_group):
    before = footprint()
    with contextlib.ExitStack() as ends:

        def make(seed: int, rank: int) -> Any:
            options = {"seed": seed, "producers": 2, "shared": True}
            return ends.enter_context(make_stream(rank=rank, world_size=2, **options))

        ranks_module._opened.clear()
        streams = {(seed, 0): make(seed, 0) for seed in (1, 2)}
        ranks_module._opened.clear()  # as in another process
        streams |= {(seed, 1): make(seed, 1) for seed in (2, 1)}
        for at in [(2, 1), (1, 0), (1, 1), (2, 0)]:
            streams[at].start()
        for seed, rank in [(1, 1), (2, 1), (2, 0), (1, 0)]:
            assert images_of(streams[seed, rank].take(40)) == undisturbed([40], seed=seed, rank=rank, world_size=2)
        hosts = {at: tuple(producers_of(stream, 2)) for at, stream in streams.items()}
        assert hosts[1, 0] == hosts[1, 1] and hosts[2, 0] == hosts[2, 1]
        assert len({pid for pids in hosts.values() for pid in pids}) == 4
    assert_given_back(before)


@pytest.mark.parametrize("spare", [2, 6, 9, 12, 14, 17, 20])
def test_with_so_many_descriptors_left_it_works_or_says_what_is_missing_and_leaks_none(in_a_group, spare):
    before = footprint()
    with make_stream(shared=True, rank=0, world_size=2) as stream, descriptors_left(spare):
        if spare > 17:
            stream.take(9)
        else:
            with pytest.raises(StreamaugError, match=r"Too many open files \(see ulimit -n"):
                stream.take(9)
    assert_given_back(before)


def test_an_answer_whose_descriptor_finds_no_room_says_what_is_missing(in_a_group, monkeypatch):
    monkeypatch.setattr(sharing, "receive", lambda connection: ({"pid": 1}, []))
    with (
        make_stream(shared=True, rank=0, world_size=2) as stream,
        pytest.raises(StreamaugError, match=r"Too many open files \(see ulimit -n"),
    ):
        stream.take(9)


def test_a_store_that_does_not_answer_is_an_error_of_ours(monkeypatch):
    class Broken:
        def compare_set(self, *arguments: str) -> bytes:
            raise dist.DistNetworkError("connection reset by peer")

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", Broken)
    with (
        make_stream(shared=True, rank=0, world_size=2, seed=7) as stream,
        pytest.raises(StreamaugError, match=r"store does not answer .*connection reset"),
    ):
        stream.take(1)


def test_a_single_rank_shares_with_nobody():
    with make_stream(shared=True) as stream:
        assert images_of(stream.take(20)) == undisturbed([20])


def test_threads_of_the_trainer_cannot_be_shared():
    with pytest.raises(ConfigError, match=r"shared needs producers that are processes"):
        load("digits", ["stream.shared=true", "stream.backend=local"])


def test_another_users_process_is_not_talked_to(monkeypatch):
    listening, address = sockets.listen()
    with listening, sockets.connect(address) as connection:
        sockets.Peer.of(connection).close()
        monkeypatch.setattr(os, "geteuid", lambda user=os.geteuid(): user + 1)
        with pytest.raises(StreamaugError, match="of user"):
            sockets.Peer.of(connection)

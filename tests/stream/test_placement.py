"""Where producers run and slots live: chosen by the two sides' devices, shared once, pinned and unpinned.

The processes are real, the GPUs a double (`double.py`); tests marked `gpu` need a real one.
"""

import os
import signal
import socket
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from streamaug.config import StreamConfig
from streamaug.errors import MemoryTooSmall, ProducerError, StreamaugError, UsageError
from streamaug.stream import stream
from streamaug.stream.footprint import children
from streamaug.stream.producer import serve
from streamaug.stream.producers import backends
from streamaug.stream.producers.backends import Work
from streamaug.stream.producers.fleet import Fleet
from streamaug.stream.producers.placement import Placement, Sides, choose
from streamaug.stream.ring import FAILED, Layout, Ring, cuda
from streamaug.stream.ring.cuda import Cuda, CudaError
from streamaug.stream.ring.emission import Emission
from streamaug.stream.ring.memory import Memory
from streamaug.stream.ring.pixels import DeviceImages

from .double import UUIDS, DoubleCuda, DoubleEvent, calls, lay_out
from .fakes import IMAGE_SHAPE, images_of, listed, make_planner, make_stream, producers_of, undisturbed, until

EMITTING = f"{__package__}.double:build"
LAYOUT = Layout(8, IMAGE_SHAPE, 2)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """The folder of a machine with one GPU; `lay_out` again for another."""
    monkeypatch.setattr(cuda, "PROVIDER", f"{__package__}.double:DoubleCuda")
    monkeypatch.setenv("STREAMAUG_DOUBLE", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(backends, "_LEAVE_SECONDS", 30.0)  # what a producer gives back, it gives back before its end
    lay_out(tmp_path)
    return tmp_path


@pytest.fixture
def on(monkeypatch):
    """Streams made from now on have their producers, and their trainer, on these devices."""

    def put(producer: str, trainer: str) -> None:
        class Placed(Fleet):
            def __init__(self, config, backend, layout, judge_nbytes, work, **options):
                work = replace(work, device=producer, environment={})
                super().__init__(config, backend, layout, judge_nbytes, work, **(options | {"trainer_device": trainer}))

        monkeypatch.setattr(stream, "Fleet", Placed)

    return put


def called(folder, *names: str) -> list[str]:
    return [name for _, name, _ in calls(folder) if name in names]


# What is chosen.


@pytest.mark.parametrize(
    ("setting", "backend", "producer", "trainer", "kind"),
    [
        ("auto", "process", "cpu", "cpu", "host"),
        ("auto", "local", "cpu", "cpu", "host"),
        ("auto", "process", "cuda", "cpu", "pinned"),
        ("auto", "process", "cpu", "cuda", "pinned"),
        ("auto", "local", "cuda", "cpu", "pinned"),
        ("auto", "process", "cuda", "cuda", "cuda"),
        ("auto", "local", "cuda", "cuda", "cuda"),
        ("auto", "process", "cuda:1", "cuda:0", "cuda"),
        ("pinned", "process", "cuda", "cuda", "pinned"),
        ("memfd", "process", "cuda", "cuda", "host"),
        ("shm", "process", "cuda", "cpu", "host"),
        ("cuda", "process", "cuda", "cuda", "cuda"),
    ],
)
def test_auto_chooses_by_where_the_sides_are_and_what_is_asked_for_is_had(
    setting, backend, producer, trainer, kind, machine
):
    assert choose(setting, Sides(backend, (producer,), trainer), DoubleCuda()) == kind


@pytest.mark.parametrize(
    ("setting", "producer", "trainer", "message"),
    [
        ("pinned", "cpu", "cpu", "no side is on a GPU (producer on cpu, trainer on cpu); auto and memfd work"),
        ("cuda", "cpu", "cpu", "no side is on a GPU"),
        ("cuda", "cuda", "cpu", "needs both sides on a GPU (producer on cuda, trainer on cpu); auto and pinned work"),
        ("cuda", "cuda:1", "cuda:0", "GPU 1 of the producer cannot reach the memory of GPU 0 of the trainer (no peer"),
    ],
)
def test_a_kind_that_cannot_be_had_is_refused_with_what_works(setting, producer, trainer, message, machine):
    lay_out(machine, gpus=2, peers=False)
    with pytest.raises(UsageError) as error:
        choose(setting, Sides("process", (producer,), trainer), DoubleCuda())
    assert message in str(error.value)


def test_without_peer_access_auto_pins(machine):
    lay_out(machine, gpus=2, peers=False)
    assert choose("auto", Sides("process", ("cuda:1",), "cuda:0"), DoubleCuda()) == "pinned"


def test_a_stream_on_the_cpu_refuses_memory_of_a_gpu_and_asks_torch_nothing(monkeypatch):
    monkeypatch.setattr(cuda, "PROVIDER", "no.such:thing")
    with pytest.raises(UsageError, match=r"stream\.memory is cuda, but no side is on a GPU"):
        make_stream(memory="cuda")
    make_stream().close()


def test_where_slots_live_is_said_in_words(machine):
    config = StreamConfig(producers=2)
    work = Work("a:b", {}, 0, 1, 0, device="cuda")
    said = [str(Placement(config, "process", LAYOUT, work, trainer)) for trainer in ("cuda:0", "cpu")]
    assert said == [
        "slots live in the memory of GPU cuda:0: producer on cuda, trainer on cuda:0 (stream.memory: auto)",
        "slots live in pinned host memory (memfd): producer on cuda, trainer on cpu (stream.memory: auto)",
    ]


# Memory of a GPU, through processes.


@pytest.mark.parametrize("tensors", [False, True])
def test_slots_in_a_gpus_memory_are_shared_once_and_bring_the_same_images(tensors, machine, on):
    lay_out(machine, tensors=tensors)
    on("cuda", "cuda:0")
    engine = {"engine": EMITTING} if tensors else {}
    with make_stream(**engine, producers=2, engine_options={"reject": 0.3}) as one:
        assert listed(one, [5, 40, 40]) == undisturbed_on_the_cpu([85], engine_options={"reject": 0.3})
        producers = producers_of(one, 2)
        assert one.ring_nbytes == 2 * Layout(8, IMAGE_SHAPE, 2, images_apart=True).nbytes
    made = calls(machine)
    assert [(pid, name) for pid, name, _ in made if name in ("allocate", "free")] == [
        (os.getpid(), name) for name in ("allocate", "allocate", "free", "free")
    ]
    assert sorted(pid for pid, name, _ in made if name == "open") == sorted(producers)
    assert called(machine, "close", "free") == ["close", "close", "free", "free"]  # those that map it go first
    assert {argument for _, name, argument in made if name in ("allocate", "open")} == {UUIDS[0]}
    assert not list(machine.glob("memory-*"))


@pytest.mark.parametrize("starved", ["wait", "reuse"])
def test_images_are_handed_out_on_the_gpu_that_is_asked_for(starved, machine):
    lay_out(machine, tensors=True)
    with make_stream(backend="local", deliver_on="cuda:0", starved=starved, max_reuse=1000) as one:
        batches = [one.take(20) for _ in range(4)]
    seen = {}
    for batch in batches:
        assert isinstance(batch.images, torch.Tensor) and batch.images.dtype == torch.uint8
        for number, image in zip(batch.ids.tolist(), batch.images, strict=True):
            assert seen.setdefault(number, image.clone()).equal(image)
    with make_stream(backend="local") as one:
        known = one.take(80)
    same = dict(zip(known.ids.tolist(), known.images, strict=True))
    assert len(seen) > 7 and all((image.numpy() == same[number]).all() for number, image in seen.items())


class Queued(TorchDispatchMode):
    """Torch's calls in this thread; whether each leaves the host free, were its tensors on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, bool] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        free = dict.fromkeys(("aten::empty", "aten::slice", "aten::lift_fresh"), True)  # the last is from_numpy's
        free["aten::copy_"] = args[2:] == (True,) or (kwargs or {}).get("non_blocking", False)
        name = func._schema.name
        self.calls[name] = self.calls.get(name, True) and free.get(name, False)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("memory", ["cuda", "pinned"])
def test_a_take_queues_its_copy_and_asks_the_device_for_nothing(memory, machine, on):
    lay_out(machine, tensors=True)
    on("cuda", "cuda:0")
    with make_stream(engine=EMITTING, backend="local", memory=memory, deliver_on="cuda:0") as one:
        one.take(8)
        with Queued() as queued:
            for _ in range(10):
                one.take(12)
    assert "aten::copy_" in queued.calls and all(queued.calls.values()), queued.calls


def test_images_are_not_handed_out_on_a_gpu_that_is_not_there(machine):
    lay_out(machine, gpus=0)
    with pytest.raises(UsageError, match=r"stream.deliver_on is cuda, but torch finds no usable GPU; cpu works"):
        make_stream(deliver_on="cuda")


def undisturbed_on_the_cpu(takes, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "Fleet", Fleet)
        return undisturbed(takes, **options)


@pytest.mark.parametrize("point", ["mid_write", "before_publish"])
def test_a_killed_producer_frees_nothing_and_the_next_one_opens_the_same_memory(point, machine, on, monkeypatch):
    on("cuda", "cuda")
    monkeypatch.setenv("STREAMAUG_FAULT", f"{point}:3")
    with make_stream() as one:
        assert listed(one, [60]) == undisturbed_on_the_cpu([60])
        assert one.stats().restarts == 1
    assert called(machine, "allocate", "open", "close", "free") == ["allocate", "open", "open", "close", "free"]


def test_a_gpu_is_known_by_its_uuid_however_the_producer_counts(machine, on):
    lay_out(machine, gpus=3)
    on("cuda", "cuda:1")
    with make_stream(producers=2, devices=[2, 0]) as one:
        assert listed(one, [40]) == undisturbed_on_the_cpu([40])
    opened = [argument for _, name, argument in calls(machine) if name in ("allocate", "open")]
    assert opened == 4 * [UUIDS[1]]


def test_a_producer_that_does_not_see_the_gpu_is_an_error_with_what_works(machine, monkeypatch):
    lay_out(machine, gpus=2)
    shared = DeviceImages.allocate("cuda:0", LAYOUT.images_shape).share()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with pytest.raises(UsageError, match=f"does not see the trainer's GPU {UUIDS[0]}: it sees {UUIDS[1]}; name it in"):
        DeviceImages.attach(shared, LAYOUT.images_shape, "cuda")


def test_a_producers_gpu_that_cannot_reach_the_memory_is_refused_in_the_producer_too(machine):
    lay_out(machine, gpus=2, peers=False)
    shared = DeviceImages.allocate("cuda:0", LAYOUT.images_shape).share()
    with pytest.raises(UsageError, match=r"\(no peer access\): stream.memory: pinned works"):
        DeviceImages.attach(shared, LAYOUT.images_shape, "cuda:1")


def test_what_a_producer_is_refused_when_it_opens_memory_reaches_the_trainer(machine, on):
    on("cuda", "cuda")
    lay_out(machine, refuse=("open",))
    with (
        make_stream() as one,
        pytest.raises(ProducerError, match="CudaError while starting: open: not perm"),
    ):
        one.take(1)


def test_a_ring_that_a_gpu_cannot_hold_is_refused_with_numbers(machine, on):
    on("cuda", "cuda")
    lay_out(machine, free=1000)
    with pytest.raises(
        MemoryTooSmall, match=r"needs 2\.0 kB, but only 1\.0 kB are free on GPU 0; .*stream\.batch_size"
    ):
        make_stream()
    lay_out(machine, refuse=("allocate",))
    with make_stream() as one, pytest.raises(MemoryTooSmall, match="it refused: allocate: not permitted"):
        one.take(1)


def test_a_thread_on_the_trainers_gpu_writes_to_its_memory(machine, on):
    lay_out(machine, tensors=True)
    on("cuda", "cuda")
    with make_stream(engine=EMITTING, backend="local") as one:
        assert listed(one, [40]) == undisturbed_on_the_cpu([40])
    assert called(machine, "allocate", "open", "close", "free", "stream") == ["allocate", "stream", "free"]


# Pinned memory of the host.


@pytest.mark.parametrize(("producer", "trainer"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_the_side_with_a_gpu_registers_the_block_and_unregisters_it(producer, trainer, machine, on):
    on(producer, trainer)
    with make_stream() as one:
        assert listed(one, [40]) == undisturbed_on_the_cpu([40])
        pids = {"cuda": producers_of(one)[0], "cpu": os.getpid()}
        nbytes = one.ring_nbytes
    assert [(pid, name) for pid, name, _ in calls(machine) if name != "stream"] == [
        (pids[producer], "register"),
        (pids[producer], "unregister"),
    ]
    assert [argument for _, name, argument in calls(machine) if name == "register"] == [str(nbytes)]


def test_a_killed_producers_successor_registers_the_block_again(machine, on):
    on("cuda", "cpu")
    with make_stream() as one:
        images = listed(one, [20])
        os.kill(*producers_of(one), signal.SIGKILL)
        images += listed(one, [40])
    assert images == undisturbed_on_the_cpu([60])
    assert called(machine, "register", "unregister") == ["register", "register", "unregister"]


def test_a_thread_on_a_gpu_beside_a_trainer_on_the_cpu_registers_once(machine, on):
    on("cuda", "cpu")
    with make_stream(engine=EMITTING, backend="local") as one:
        assert listed(one, [40]) == undisturbed_on_the_cpu([40])
    assert called(machine, "register", "unregister") == ["register", "unregister"]


def test_memory_that_cannot_be_pinned_is_used_as_it_is_unless_pinned_was_asked_for(machine, on, caplog):
    on("cpu", "cuda")
    lay_out(machine, refuse=("register",))
    with make_stream() as one:
        assert listed(one, [40]) == undisturbed_on_the_cpu([40])
    assert "the ring is not pinned, copies to and from the GPU are slower: register: not permitted" in caplog.text
    assert called(machine, "unregister") == []
    with (
        make_stream(memory="pinned") as one,
        pytest.raises(StreamaugError, match=r"cannot be pinned: register: not permitted .*ulimit -l"),
    ):
        one.take(1)


# What waits for a device, and what does not.


class Emitted(Emission):
    """On its way until it is told otherwise."""

    def __init__(self) -> None:
        self.polls = 0
        self.there = False

    def done(self) -> bool:
        self.polls += 1
        return self.there

    def complete(self) -> int:
        return 8


class Emitting:
    image_shape, stage_seconds = IMAGE_SHAPE, {}

    def __init__(self, emitted: Emitted):
        self.emitted = emitted

    def make(self, order, slot) -> Emitted:
        return self.emitted


def test_a_slot_is_published_once_its_event_is_true_and_until_then_it_is_polled_and_beats():
    ring = Ring(Memory(LAYOUT.nbytes, None), LAYOUT)
    ours, theirs = socket.socketpair()
    emitted = Emitted()
    ring.issue(make_planner(8).batch(0, make_planner(8).uniform()))
    thread = threading.Thread(target=serve, args=(ring, None, theirs, lambda: Emitting(emitted)), daemon=True)
    thread.start()
    until(lambda: emitted.polls > 3)
    beat = ring.last_beat_ns
    until(lambda: ring.last_beat_ns > beat)
    assert ring.published == 0
    emitted.there = True
    until(lambda: ring.published == 1)
    assert ring.slot(0).count == 8 and ring.state != FAILED
    ring.close()
    thread.join(10)
    ours.close()
    theirs.close()


def test_a_slot_is_not_written_again_before_the_trainers_gpu_has_read_it():
    ring = Ring(Memory(LAYOUT.nbytes, None), LAYOUT)
    slot, event = ring.slot(0), DoubleEvent(queries=2)
    slot.images[:] = 7
    slot.place(slot.images, lambda: event)
    out = torch.zeros(3, *IMAGE_SHAPE, dtype=torch.uint8)
    slot.copy_images(slice(2, 5), out)
    assert (out == 7).all()
    assert [slot.free, slot.free, slot.free] == [False, False, True]


@pytest.mark.parametrize("apart", [False, True])
def test_images_of_either_kind_are_copied_to_an_array_or_a_tensor(apart):
    ring = Ring(Memory(LAYOUT.nbytes, None), LAYOUT)
    slot = ring.slot(1)
    slot.images[:] = np.arange(8, dtype=np.uint8)[:, None, None, None]
    if apart:
        slot.place(torch.from_numpy(slot.images.copy()), lambda: None)
    for out in (np.zeros((3, *IMAGE_SHAPE), np.uint8), torch.zeros((3, *IMAGE_SHAPE), dtype=torch.uint8)):
        slot.copy_images(slice(4, 7), out)
        assert out[:, 0, 0, 0].tolist() == [4, 5, 6]
        assert slot.free


def test_an_order_waits_for_the_slot_that_the_gpu_still_reads(machine, on):
    on("cuda", "cuda")
    with make_stream(in_flight=1) as one:
        one.take(8)
        slot = one._fleet.rings[0].slot(1)
        slot.copy_images(slice(0, 8), torch.zeros(8, *IMAGE_SHAPE, dtype=torch.uint8))
        assert not slot.free
        assert images_of(one.take(16)) == undisturbed_on_the_cpu([24])[8:]
        assert slot.free


# GPUs of one's choice.


def environment_of(pid: int) -> dict[str, str]:
    with open(f"/proc/{pid}/environ") as file:
        return dict(pair.split("=", 1) for pair in file.read().split("\0") if pair)


def test_gpus_are_dealt_out_to_producers_in_turn_before_anything_is_imported(machine, on):
    lay_out(machine, gpus=2)
    on("cuda", "cpu")
    with make_stream(producers=3, devices=[1, f"GPU-{UUIDS[0]}"]) as one:
        one.take(8)
        found = [environment_of(pid) for pid in producers_of(one, 3)]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in found] == ["1", "0", "1"]
    assert {each["CUDA_MPS_CLIENT_PRIORITY"] for each in found} == {"1"}


def test_gpus_are_counted_as_the_trainer_sees_them(machine, on, monkeypatch):
    lay_out(machine, gpus=3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,1")
    on("cuda", "cpu")
    with make_stream(devices=[0]) as one:
        one.take(8)
        assert environment_of(*producers_of(one))["CUDA_VISIBLE_DEVICES"] == "2"


@pytest.mark.parametrize(
    ("devices", "of_model", "backend", "message"),
    [
        ([0], "cpu", "process", "model.device is cpu and the model runs on the CPU: leave stream.devices empty, or"),
        ([2], "cuda", "process", "stream.devices names GPU 2, but there are 2: accepted are 0 to 1"),
        (
            ["22222222-bbbc"],
            "auto",
            "process",
            f"none of the GPUs here: {UUIDS[0]}, {UUIDS[1]} (did you mean '{UUIDS[1]}'",
        ),
        ([0], "cuda:1", "process", "both choose a GPU: set model.device: cuda"),
        ([0], "cuda", "local", "set stream.backend: process"),
    ],
)
def test_gpus_that_cannot_be_had_are_refused(devices, of_model, backend, message, machine):
    lay_out(machine, gpus=2)
    work = Work("a:b", {}, 0, 1, 0, device=of_model)
    with pytest.raises(UsageError) as error:
        Placement(StreamConfig(devices=devices), backend, LAYOUT, work, "cpu")
    assert message in str(error.value)


def test_gpus_on_a_machine_without_one_are_refused(machine):
    lay_out(machine, gpus=0)
    work = Work("a:b", {}, 0, 1, 0, device="auto")
    with pytest.raises(UsageError, match=r"model\.device is auto and torch finds no usable GPU"):
        Placement(StreamConfig(devices=[0]), "process", LAYOUT, work, "cpu")


def test_a_model_that_takes_what_there_is_sees_no_gpu_where_there_is_none_and_may_be_copied(machine):
    work = Work("a:b", {}, 0, 1, 0, device="auto")
    assert Placement(StreamConfig(), "process", LAYOUT, work, "cpu").sees_gpus(work)
    lay_out(machine, gpus=0)
    placement = Placement(StreamConfig(), "process", LAYOUT, work, "cpu")
    assert not placement.sees_gpus(work) and placement.work(work, 0).device == "cpu"


@pytest.mark.parametrize("device", ["cuda", "auto"])
def test_producers_that_see_a_gpu_are_never_copies(device, machine, on):
    on(device, "cpu")
    with pytest.raises(UsageError, match="a copied process cannot use a GPU safely"):
        make_stream(start_method="forkserver")
    others = set(children())
    with make_stream() as one:
        one.take(8)
        assert set(producers_of(one)) == set(children()) - others


def test_more_gpus_than_producers_is_said(machine, caplog):
    lay_out(machine, gpus=2)
    Placement(StreamConfig(devices=[0, 1]), "process", LAYOUT, Work("a:b", {}, 0, 1, 0, device="cuda"), "cpu")
    assert "names 2 GPUs for 1 producers: set stream.producers=2 to use them all" in caplog.text


def test_a_producer_runs_on_a_stream_of_the_least_priority_and_a_trainer_may_take_the_greatest(machine, on):
    on("cuda", "cpu")
    with make_stream() as one:
        one.take(8)
        (pid,) = producers_of(one)
    with cuda.foreground("cuda:0"):
        pass
    assert [(who, argument) for who, name, argument in calls(machine) if name == "stream"] == [
        (pid, "background"),
        (os.getpid(), "foreground"),
    ]


# The real thing.


def test_without_a_gpu_the_runtimes_refusal_is_an_error_with_its_words():
    real = Cuda()
    if real.count():
        real.allocate(0, 1 << 20)
        with pytest.raises(CudaError, match=r"cudaMalloc: out of memory \(CUDA error 2\)"):
            real._call("cudaMalloc", None, 1 << 60)
        return
    with pytest.raises(CudaError, match=r"cudaHostUnregister: .+ \(CUDA error \d+\)|this build of torch has no CUDA"):
        real.unregister(4096)


def build_on_gpu(options: dict) -> "GpuEngine":
    return GpuEngine(options)


class GpuEngine:
    """Fills images with their ids on the GPU and hands them over without waiting for it."""

    def __init__(self, options: dict):
        self.image_shape = tuple(options["image_shape"])
        self.stage_seconds: dict[str, float] = {}

    def load_judge(self, version, state) -> None:
        pass

    def make(self, order, slot) -> Emission:
        ids = torch.from_numpy(order.images["id"].copy()).cuda(non_blocking=True)
        images = (ids % 251).byte()[:, None, None, None].expand(-1, *self.image_shape).contiguous()
        count = torch.full((1,), len(order), device="cuda")
        rank = torch.arange(len(order), device="cuda")
        reasons = torch.zeros(len(order), dtype=torch.uint8, device="cuda")
        return Emission(
            order, slot, images, source=rank, count=count, reasons=reasons, scores=torch.ones(len(order), device="cuda")
        )


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["local", "process"])
@pytest.mark.parametrize("memory", ["auto", "cuda", "pinned", "memfd"])
def test_a_gpu_brings_every_image_through_every_kind_of_memory(backend, memory, on):
    on("cuda", "cuda:0")
    with make_stream(engine=f"{__name__}:build_on_gpu", backend=backend, memory=memory, in_flight=2) as one:
        fleet, seen = one._fleet, 0
        one.start()
        for number in range(40):
            order = one.planner.batch(number)
            fleet.issue(0, order, 0)
            ring = fleet.rings[0]
            until(lambda ring=ring, number=number: fleet.check() is None and ring.published > number, 60)
            if number == 20 and backend == "process":
                os.kill(one.producer_pids[0], signal.SIGKILL)
            slot, out = ring.slot(number), fleet.new_images(8)
            slot.copy_images(slice(0, slot.count), out)
            assert (out[:, 0, 0, 0].cpu().numpy() == order.images["id"] % 251).all()
            assert out.is_cuda and (slot.ids == order.images["id"]).all()
            seen += len(out)
    assert seen == 320


@pytest.mark.gpu
@pytest.mark.parametrize("starved", ["wait", "reuse"])
def test_take_hands_out_images_on_a_gpu(starved, on):
    on("cuda", "cuda:0")
    with make_stream(engine=f"{__name__}:build_on_gpu", starved=starved, deliver_on="cuda") as one:
        for _ in range(20):
            batch = one.take(12)
            assert batch.images.is_cuda and (batch.images[:, 0, 0, 0].cpu().numpy() == batch.ids % 251).all()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["local", "process"])
@pytest.mark.parametrize("memory", ["cuda", "pinned"])
def test_takes_in_steady_state_make_no_synchronising_call(backend, memory, on):
    """As torch sees them; a profiler's trace, which shows every call of the runtime, is in test_bench_gpu.py."""
    on("cuda", "cuda:0")
    with make_stream(
        engine=f"{__name__}:build_on_gpu", backend=backend, memory=memory, deliver_on="cuda", in_flight=2
    ) as one:
        for _ in range(5):
            one.take(12)
        torch.cuda.set_sync_debug_mode("error")
        try:
            batches = [one.take(12) for _ in range(40)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all((batch.images[:, 0, 0, 0].cpu().numpy() == batch.ids % 251).all() for batch in batches)


@pytest.mark.gpu
def test_a_registered_block_counts_as_pinned_for_torch(on):
    on("cuda", "cuda:0")
    with make_stream(engine=f"{__name__}:build_on_gpu", memory="pinned") as one:
        one.start()
        assert torch.from_numpy(one._fleet.rings[0].slot(0).images).is_pinned()


@pytest.mark.gpu
def test_memory_of_a_gpu_is_given_back(on):
    on("cuda", "cuda:0")
    free = []
    for _ in range(4):
        with make_stream(engine=f"{__name__}:build_on_gpu", backend="local", batch_size=4096) as one:
            one.start()
            time.sleep(0.1)
        free.append(torch.cuda.mem_get_info()[0])
    assert free[-1] == free[1]

"""The GPU suite's code, run on the CPU at tiny sizes: every part ends, and what it finds is sane."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.timeout(450)  # the first test runs the suite


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--quick", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=400)
    return json.loads((out / "gpu.json").read_text()) | {"text": (out / "gpu.txt").read_text()}


def rows(report, part):
    assert "failed" not in report["parts"][part]
    return report["parts"][part]["rows"]


def test_our_samples_equal_the_diffusers_loop_for_every_network_guided_and_not(report):
    assert [(row["kind"], row["guided"], row["ok"], row["graph_repeats_bits"]) for row in rows(report, "parity")] == [
        (kind, guided, True, True) for kind in ("digits", "dit", "sd") for guided in (False, True)
    ]


def test_every_kernel_is_measured_beside_eager_torch_and_a_copy(report):
    measured = rows(report, "kernels")
    assert [row["kernel"] for row in measured] == ["step", "philox", "perturb", "emit", "rescale"]
    assert all(row["eager_over_ours"] > 0 and row["copy_over_ours"] > 0 for row in measured)


def test_the_engine_is_measured_at_every_batch_size(report):
    assert len(rows(report, "engine")) == 3 * 2 * 2
    assert all(row["eager_ratio"] > 0 for row in rows(report, "engine"))
    assert len(rows(report, "memory")) == 3


def test_the_ring_is_measured_with_both_backends(report):
    measured = rows(report, "ring")
    assert [(row["backend"], row["figure"]) for row in measured] == [
        (backend, figure) for backend in ("local", "process") for figure in ("bandwidth", "latency")
    ]
    assert all(row["copy_over_take"] > 0 and row["synchronising_calls"] == 0 for row in measured[::2])
    assert all(0 < row["latency_p50_us"] < row["returned_p50_us"] for row in measured[1::2])


def test_the_text_table_has_every_part_and_the_goals_beside_what_was_found(report):
    assert all(f"{part} (" in report["text"] for part in report["parts"] if report["parts"][part]["rows"])
    assert "step over eager scheduler.step >= 4.5: " in report["text"]
    assert "step over torch.compile >= 1: (not measured)" in report["text"]
    assert "share of a copy's bandwidth on the device >= 0.9: (not measured)" in report["text"]
    assert "synchronising calls in a take <= 0: 0 (met)" in report["text"]


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import gpu

    return gpu


@pytest.mark.parametrize("classes", [0, 10])
def test_the_digits_network_is_the_prior_that_the_package_trains(gpu, classes):
    from streamaug.config import PriorConfig
    from streamaug.prior import build_unet

    measured = gpu.networks.build("digits", small=False, classes=bool(classes))
    assert measured.config == build_unet((1, 8, 8), PriorConfig(), classes).config


def test_a_checkout_that_was_never_installed_is_enough_and_pydantic_is_not_needed():
    """Without the installation's import hook, which the site module brings."""
    packages = str(Path(torch.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": packages}
    code = """
import runpy, sys
sys.modules["pydantic"], sys.argv = None, ["gpu", "--help"]
runpy.run_module("bench.gpu", run_name="__main__")
"""
    command = [sys.executable, "-S", "-c", code]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert found.returncode == 0 and "--minutes" in found.stdout, found.stderr


def test_a_goal_is_held_against_the_worst_case_and_what_was_not_measured_is_not_met_nor_missed(gpu):
    parts = {
        "parity": {"rows": [{"graph_error": 1e-5, "half_grey_levels": 0.5}, {"graph_error": 2e-3}, {"failed": "why"}]},
        "kernels": {
            "rows": [
                {"kernel": "step", "shape": [64, 1], "eager_over_ours": 9.0, "captured_copy_over_ours": 0.2},
                {"kernel": "step", "shape": [512, 4], "eager_over_ours": 5.0, "captured_copy_over_ours": 0.9},
                {"kernel": "emit", "shape": [512, 4], "skipped": "out of time"},
            ]
        },
        "ring": {
            "rows": [
                {"device_copy_over_take": 0.97, "copy_over_take": 0.3, "synchronising_calls": 0.0},
                {"device_copy_over_take": 0.93, "copy_over_take": 0.8, "synchronising_calls": 0.5},
                {"latency_p50_us": 60.0},
            ]
        },
        "compiled": {
            "rows": [{"kind": "dit", "batch": batch, "defaults_ratio": 1.7} for batch in (2, 8, 32)],
        },
    }
    found = {row["goal"]: (row["found"], row["met"]) for row in gpu.goals(parts)}
    assert found == {
        "largest difference in fp32, standard deviations": (2e-3, False),
        "mean difference of fp16, grey levels": (0.5, True),
        "step over eager scheduler.step": (5.0, True),
        "step over torch.compile": (None, None),
        "step, share of a copy's bandwidth": (0.9, True),
        "emit, share of a copy's bandwidth": (None, None),
        "take, share of a copy's bandwidth on the device": (0.93, True),
        "take, share of a copy's bandwidth by the clock": (0.3, False),
        "published to seen by the trainer, median, microseconds": (60.0, True),
        "synchronising calls in a take": (0.5, False),
        "defaults_ratio_b2, dit": (1.7, False),
        "defaults_ratio_b32, dit": (1.7, True),
    }


def test_every_case_is_saved_and_one_that_fails_or_comes_too_late_does_not_stop_the_rest(gpu, monkeypatch, tmp_path):
    saved = []

    def fails():
        raise ValueError("broken")

    def too_large():
        raise torch.cuda.OutOfMemoryError("no memory")

    def part(suite):
        for number, (measure, needed) in enumerate([(fails, 1), (too_large, 1), (dict, 1e6), (lambda: {"x": 1.0}, 1)]):
            if number:
                saved.append(len(json.loads((tmp_path / "gpu.json").read_text())["parts"]["engine"]["rows"]))
            yield {"number": number}, measure, needed

    empty = dict.fromkeys(gpu.PARTS, lambda suite: [])
    monkeypatch.setattr(gpu, "PARTS", empty | {"engine": part})
    suite = gpu.Suite(torch.device("cpu"), quick=True, minutes=1)
    report = gpu.run(suite, tmp_path)
    assert saved[:3] == [1, 2, 3]
    rows = report["parts"]["engine"]["rows"]
    assert rows[0]["failed"] == "ValueError: broken" and report["parts"]["engine"]["failed"] == 1
    assert [row.get("skipped") for row in rows] == [None, "out of memory", "out of time", None]
    assert rows[3]["x"] == 1.0 and "number=3" in (tmp_path / "gpu.txt").read_text()


@pytest.fixture
def handoff(gpu):
    return gpu.handoff


def test_without_pydantic_the_ring_is_left_out_and_says_so(gpu, monkeypatch):
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    suite = gpu.Suite(torch.device("cpu"), quick=True, minutes=1)
    assert [measure() for _, measure, _ in gpu.ring(suite)] == [{"skipped": "needs pydantic"}] * 4


def test_calls_that_synchronise_count_within_a_take_and_nowhere_else(handoff):
    def waits():
        for name in ("cudaStreamSynchronize", "cudaMemcpy", "cudaMemcpyAsync", "cudaEventQuery", "cudaFree_v3020"):
            with torch.profiler.record_function(name):
                pass

    events = handoff.trace(torch.device("cpu"), {"take": waits, "copy": waits}, 3, prepare=waits)
    assert sorted(handoff.synchronising(events, "take")) == sorted(
        ["cudaStreamSynchronize", "cudaMemcpy", "cudaFree_v3020"] * 3
    )


def event(name, start, end, device="CUDA"):
    interval = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    return SimpleNamespace(name=name, device_type=getattr(torch.autograd.DeviceType, device), time_range=interval)


TRACE = [
    event("Memcpy DtoD (Device -> Device)", 5, 6),  # before the first take
    event("take", 10, 30, "CPU"),
    event("take", 25, 38),  # the range as the device sees it
    event("Memcpy DtoH (Device -> Pinned)", 20, 22),  # of a producer in the same process
    event("Memcpy DtoD (Device -> Device)", 28, 38),
    event("cudaDeviceSynchronize", 31, 39, "CPU"),  # ours, behind the take
    event("copy", 50, 55, "CPU"),
    event("Memcpy DtoD (Device -> Device)", 56, 65),
]


def test_the_devices_own_time_for_a_take_and_for_a_copy_is_read_from_the_trace(handoff):
    assert handoff.copied_us(TRACE, ("take", "copy"), "DtoD") == {"take": [10], "copy": [9]}
    shown = handoff._shown(TRACE, torch.device("cuda"), "DtoD")
    assert shown == {"device_copy_over_take": 0.9, "synchronising_calls": 0}
    shown = handoff._shown([*TRACE, event("cudaStreamSynchronize", 12, 13, "CPU")], torch.device("cuda"), "DtoD")
    assert shown["synchronising_calls"] == 1 and shown["synchronising"] == ["cudaStreamSynchronize"]


def test_a_trace_that_does_not_show_the_device_is_no_evidence(handoff):
    assert handoff._shown([each for each in TRACE if "Memcpy" not in each.name], torch.device("cuda"), "DtoD") == {}


def test_on_a_gpu_the_filling_engine_hands_over_batches_that_are_still_on_their_way(handoff, monkeypatch):
    from streamaug.orders import ORDER_DTYPE, OrderBatch
    from streamaug.stream.ring import Layout, Ring, emission
    from streamaug.stream.ring.memory import Memory

    class Done:
        def record(self, index):
            return SimpleNamespace(query=lambda: True)

    monkeypatch.setattr(emission, "connect", Done)
    images = np.zeros(4, ORDER_DTYPE)
    images["id"] = range(4)
    layout = Layout(4, (1, 2, 2), 2)
    ring = Ring(Memory(layout.nbytes, None), layout)
    options = {"image_shape": [1, 2, 2], "batch_size": 4, "device": torch.device("cpu"), "seconds": 0}
    engine = handoff.filling.DeviceFill(options)
    for k, there in ((5, ring.slot(0).images), (6, torch.zeros(4, 1, 2, 2, dtype=torch.uint8))):
        slot = ring.slot(k)
        slot.place(there, lambda: None)
        made = engine.make(OrderBatch(k, 0, 0, 0, images), slot)
        assert made.wait() == 4 and (np.asarray(slot.images) == k).all()
        assert slot.ids.tolist() == [0, 1, 2, 3] and slot.scores.tolist() == [1.0] * 4


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("memory", ["cuda", "pinned"])
def test_the_ring_of_a_gpu_is_measured_with_the_filling_engine(gpu, handoff, memory, monkeypatch, tmp_path):
    """The GPU is a double, whose tensors are the host's; a profiler shows no device then."""
    from stream.double import DoubleCuda, lay_out

    from streamaug.stream.ring import cuda

    lay_out(tmp_path, tensors=True)
    monkeypatch.setenv("STREAMAUG_DOUBLE", str(tmp_path))
    monkeypatch.setattr(cuda, "PROVIDER", f"{DoubleCuda.__module__}:DoubleCuda")
    monkeypatch.setattr(handoff, "_synchronize", lambda device: None)
    monkeypatch.setattr(handoff, "_plain_copy", lambda *what: lambda: None)
    on_host = lambda options: handoff.filling.DeviceFill(options | {"device": "cpu"})  # noqa: E731
    monkeypatch.setattr(handoff.filling, "build", on_host)
    found = handoff.bandwidth(torch.device("cuda:0"), "local", memory, quick=True)
    assert found["take_us"] > 0 and "synchronising_calls" not in found
    assert handoff.latency(torch.device("cuda:0"), "local", memory, quick=True)["latency_p50_us"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["local", "process"])
@pytest.mark.parametrize("memory", ["cuda", "pinned"])
def test_the_trace_of_takes_on_a_gpu_shows_their_copies_and_no_synchronising_call(handoff, backend, memory):
    found = handoff.bandwidth(torch.device("cuda"), backend, memory, quick=True)
    assert found["device_copy_over_take"] > 0 and found["synchronising_calls"] == 0, found

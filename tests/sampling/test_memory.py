"""Memory: measured on small batches before the first one, and a batch that cannot fit is refused with one that can."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from streamaug import engine as engine_module
from streamaug.config import load
from streamaug.engine import build, kinds_of
from streamaug.errors import MemoryTooSmall
from streamaug.preparation import prepare
from streamaug.sampling import memory
from streamaug.sampling.memory import Estimate, estimate, free_on_gpu, largest, peak_bytes

CPU, GPU = torch.device("cpu"), torch.device("cuda")
MB = 1 << 20


@pytest.fixture(scope="module")
def prepared(small_overrides):
    return prepare(load("digits", small_overrides))


@pytest.mark.parametrize("size", [8, 64, 100])
def test_what_a_batch_takes_is_foretold_from_an_eighth_and_a_quarter_of_it(size):
    asked = []

    def peak(n):
        asked.append(n)
        return 1000 + 30 * n

    found = estimate(peak, size)
    assert found.bytes(size) == pytest.approx(1000 + 30 * size)
    assert asked == [size // 4 // 2, size // 4, size // 4 // 2]  # the first one alone pays what is paid once


@pytest.mark.parametrize("size", [1, 2, 3])
def test_batches_of_a_few_images_are_measured_by_one_and_two(size):
    asked = []
    found = estimate(lambda n: asked.append(n) or 1000 + 30 * n, size)
    assert found.bytes(size) >= 1000 + 30 * size and max(asked) <= 2


def test_a_noisy_measurement_neither_falls_nor_rises_beyond_proportion():
    assert estimate({8: 900, 16: 800}.get, 64) == Estimate(800.0, 0.0)
    assert estimate({8: 0, 16: 800}.get, 64).bytes(64) == 4 * 800


def test_the_batch_proposed_leaves_some_memory_and_is_a_multiple_of_eight():
    needed = Estimate(1000, 30).bytes
    assert largest(needed, 4000, 512) == 80  # 1000 + 30 n <= 3600
    assert largest(needed, 1300, 512) == 5
    assert largest(needed, 1000, 512) == 0
    assert largest(needed, 1 << 40, 64) == 56  # always a smaller one


def test_growth_of_the_process_is_seen_while_it_lasts():
    # In a process of its own: what other tests import may keep freed memory for later.
    script = """
import threading
import torch
from streamaug.sampling import memory
from streamaug.sampling.memory import peak_bytes

looked, resident = threading.Event(), memory._resident_bytes

def look():
    found = resident()
    looked.set()
    return found

def run():
    for _ in range(3):
        held = torch.ones(48 * 2**18)
        for _ in range(2):  # one look may have begun before
            looked.clear()
            assert looked.wait(60)
        del held

memory._resident_bytes = look
cpu = torch.device("cpu")
print(peak_bytes(run, cpu))
kept = torch.ones(64 * 2**18)
print(peak_bytes(lambda: kept.add_(1), cpu))
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=110)
    growth, of_memory_from_before = map(int, done.stdout.split())
    assert 0.7 * 48 * MB < growth < 1.6 * 48 * MB
    assert of_memory_from_before < 16 * MB


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of 1000 bytes, of which torch holds 300 and uses 200."""
    state = SimpleNamespace(used=200, highest=200)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: state.used)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (600, 1000))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: state.highest)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: setattr(state, "highest", state.used))
    return state


def test_on_a_gpu_the_allocator_says_the_peak_and_what_is_free(gpu):
    gpu.highest = 900

    def run():
        gpu.highest = max(gpu.highest, gpu.used + 130)

    assert peak_bytes(run, GPU) == 130
    assert free_on_gpu(GPU) == 600 + 300 - 200


def test_a_batch_that_cannot_fit_is_refused_before_the_producer_is_ready(prepared, monkeypatch):
    """A network that takes a MB an image, on a machine with 10 MB."""
    monkeypatch.setattr(engine_module, "available", lambda kind: 10 * MB)
    sizes = []

    def peak(run, device):
        run()
        return sizes[-1] * MB

    original = engine_module.Engine._rehearse

    def rehearse(self, order):
        sizes.append(len(order))
        original(self, order)

    monkeypatch.setattr(engine_module, "peak_bytes", peak)
    monkeypatch.setattr(engine_module.Engine, "_rehearse", rehearse)
    with pytest.raises(
        MemoryTooSmall,
        match=r"stream\.batch_size 16 takes about 16\.8 MB in each of 2 producers, and 10\.5 MB are free .*; 4 fits",
    ):
        build(prepared.engine_options)
    assert sizes == [2, 4, 2]


def test_a_gpu_that_cannot_even_hold_a_quarter_is_halved_until_it_can(prepared, monkeypatch):
    sizes = []

    def rehearse(self, order):
        sizes.append(len(order))
        if len(order) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine_module.Engine, "_rehearse", rehearse)
    with pytest.raises(MemoryTooSmall, match=r"stream\.batch_size 16 needs more memory .* 1 fits"):
        build(prepared.engine_options)
    assert sizes == [2, 4, 2, 1]


def test_measuring_leaves_images_buffers_and_compiled_code_as_they_were(prepared, caplog):
    made = build(prepared.engine_options)
    order = prepared.planner.batch(0, prepared.planner.uniform())
    made.load_judge(0, prepared.judge_state)
    before = made.look(order)
    network, loops = made.sampler.denoiser.network, dict(made.sampler._loops)
    calls = []
    network._compiled_call_impl = lambda *args, **kwargs: calls.append(1)
    caplog.clear()
    with caplog.at_level("INFO", "streamaug"):
        made.check_memory(1 << 40)
    assert not calls and network._compiled_call_impl is not None
    network._compiled_call_impl = None
    assert made.sampler._loops == loops
    for mine, earlier in zip(made.look(order), before, strict=True):
        np.testing.assert_array_equal(mine, earlier)
    (said,) = [
        each.getMessage() for each in caplog.records if each.getMessage().startswith("a batch of 16 takes about")
    ]
    assert said.endswith("1.1 TB are free")


def test_one_evaluation_is_run_and_no_more(prepared, monkeypatch):
    made = build(prepared.engine_options)
    evaluations = []
    denoiser = type(made.sampler.denoiser)
    call = denoiser.__call__
    monkeypatch.setattr(denoiser, "__call__", lambda self, x, *args: evaluations.append(len(x)) or call(self, x, *args))
    made.check_memory(1 << 40)
    assert evaluations == [2, 4, 2]


RECIPES = "recipes=[{kind: noise, guidance: [2, 3]}, {kind: noise, depth: [0.1, 0.2]}, {kind: noise, weight: 0}]"


@pytest.mark.parametrize(
    ("overrides", "guidance", "expected"),
    [
        ([], "none", [1.0]),
        ([RECIPES], "cfg", [2.0, 1.0]),
        ([RECIPES], "embedded", [1.0]),
        (["recipes=[{kind: noise, guidance: [2, 3]}]"], "cfg", [2.0]),
        (["recipes=[{kind: noise, guidance: [2, 3]}]", "model.guidance_interval=[0.2, 0.8]"], "cfg", [2.0, 1.0]),
    ],
)
def test_the_kinds_of_batches_are_those_that_the_recipes_come_to_guided_ones_first(overrides, guidance, expected):
    kinds = kinds_of(load("digits", ["stream.batch_size=5", *overrides]), guidance)
    assert [kind.images["guidance"].tolist() for kind in kinds] == [[scale] * 5 for scale in expected]


def test_bank_rows_and_classifier_guidance_are_kinds_of_their_own():
    recipes = "recipes=[{kind: embedding}, {kind: noise, classifier_guidance: [0, 3]}]"
    kinds = kinds_of(load("digits", [recipes, "bank.methods=[encode, embedding]"]), "none")
    told = [(int(kind.images["template"][0]), float(kind.images["classifier_guidance"][0])) for kind in kinds]
    assert told == [(-1, 0.0), (0, 3.0)]
    assert [int(kind.images["row_a"][0]) for kind in kinds] == [0, -1]


def test_a_system_that_does_not_say_what_a_process_takes_refuses_nothing(prepared, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_STATM", tmp_path / "no such file")
    monkeypatch.setattr(engine_module, "available", lambda kind: 1)
    build(prepared.engine_options)


@pytest.mark.gpu
def test_the_peak_on_a_real_gpu_is_what_was_allocated():
    assert peak_bytes(lambda: torch.ones(64 * MB // 4, device=GPU), GPU) == pytest.approx(64 * MB, rel=0.05)

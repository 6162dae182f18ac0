"""The GPU suite's code, run on the CPU at tiny sizes: every part ends, and what it finds is sane."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--quick", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=110)
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


def test_the_text_table_has_every_part_and_the_goals_beside_what_was_found(report):
    assert all(f"{part} (" in report["text"] for part in report["parts"] if report["parts"][part]["rows"])
    assert "step over eager scheduler.step >= 4.5: " in report["text"]
    assert "step over torch.compile >= 1: (not measured)" in report["text"]


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


def test_a_checkout_that_was_never_installed_is_enough():
    """Without the installation's import hook, which the site module brings."""
    packages = str(Path(torch.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": packages}
    command = [sys.executable, "-S", "-m", "bench.gpu", "--help"]
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

    monkeypatch.setattr(
        gpu,
        "PARTS",
        {"parity": lambda suite: [], "kernels": lambda suite: [], "engine": part, "compiled": lambda suite: []},
    )
    suite = gpu.Suite(torch.device("cpu"), quick=True, minutes=1)
    report = gpu.run(suite, tmp_path)
    assert saved[:3] == [1, 2, 3]
    rows = report["parts"]["engine"]["rows"]
    assert rows[0]["failed"] == "ValueError: broken" and report["parts"]["engine"]["failed"] == 1
    assert [row.get("skipped") for row in rows] == [None, "out of memory", "out of time", None]
    assert rows[3]["x"] == 1.0 and "number=3" in (tmp_path / "gpu.txt").read_text()

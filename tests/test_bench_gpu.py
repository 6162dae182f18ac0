"""The GPU suite's code, run on the CPU at tiny sizes: every part ends, and what it finds is sane."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
    assert [row["kernel"] for row in measured] == ["step", "philox", "perturb"]
    assert all(row["eager_over_ours"] > 0 and row["copy_over_ours"] > 0 for row in measured)


def test_the_engine_is_measured_at_every_batch_size(report):
    assert len(rows(report, "engine")) == 3 * 2 * 2
    assert all(row["eager_ratio"] > 0 for row in rows(report, "engine"))
    assert len(rows(report, "memory")) == 3


def test_the_text_table_has_every_part(report):
    assert all(f"{part} (" in report["text"] for part in report["parts"])

"""Which implementation runs, that all is usable without Triton, and that every kernel compiles for a GPU."""

import os
import subprocess
import sys

import pytest
import torch
from streamaug.kernels import _backend
from streamaug.kernels._backend import triton_available, use_triton
from streamaug.kernels.philox import normal

from streamaug.errors import UsageError

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from streamaug.errors import UsageError
from streamaug.kernels import collect, emit, perturb, philox, step
from streamaug.kernels._backend import triton_available

assert not triton_available()
ids = torch.arange(2)
noise = philox.normal(ids, (1, 4, 4), seed=1, stream=0)
assert noise.isfinite().all()
slot = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
order, count = emit.emit(noise, torch.tensor([False, True]), slot)
assert order.tolist() == [1, -1]
assert torch.equal(collect.collect(slot, ids), slot)
try:
    philox.normal(ids, (3,), seed=1, stream=0, backend="triton")
except UsageError as error:
    assert "Triton is not installed" in str(error)
else:
    raise SystemExit("an explicit triton must be refused")
"""

COMPILE_EVERY_KERNEL = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from streamaug.kernels import collect, emit, perturb, philox, step

POINTERS = {
    "ids": "*i64", "row_a": "*i64", "row_b": "*i64", "index": "*i64", "order": "*i64", "count": "*i64",
    "x": "*fp32", "coef": "*fp32", "history": "*fp32", "weights": "*fp32", "mean": "*fp32", "std": "*fp32",
    "bank": "*fp16", "model_out": "*bf16", "net_in": "*bf16", "decoded": "*fp16", "passed": "*i1",
    "slots": "*u8", "seed": "i64", "counter_word": "i64", "first_block": "i64", "clip": "fp32",
}
FLAGS = {"BLOCK": 1024, "BLOCK_BATCH": 64}
OUT = {"_bits_kernel": "*i64", "_emit_kernel": "*u8"}
kernels = [philox._normal_kernel, philox._bits_kernel, perturb._perturb_kernel, step._step_kernel]
kernels += [emit._finite_kernel, emit._emit_kernel, collect._collect_kernel]
for kernel in kernels:
    name, arguments = kernel.__name__, kernel.arg_names
    types = POINTERS | {"out": OUT.get(name, "*fp16")}
    signature = {a: "constexpr" if a.isupper() else types.get(a, "i32") for a in arguments}
    constants = {(arguments.index(a),): FLAGS.get(a, True) for a in arguments if a.isupper()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    assert compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"], name
    print(name)
"""


def run_python(program: str, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=clean | environment, capture_output=True, text=True, timeout=100
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_auto_is_the_reference_on_a_cpu():
    assert not use_triton("auto", torch.zeros(1))


@pytest.mark.gpu
def test_auto_is_triton_on_a_gpu():
    assert use_triton("auto", torch.zeros(1, device="cuda"))
    assert not use_triton("torch", torch.zeros(1, device="cuda"))


def test_an_unknown_backend_is_refused_with_the_known_ones():
    with pytest.raises(UsageError, match="'auto', 'torch' or 'triton'"):
        normal(torch.arange(2), (3,), seed=1, stream=0, backend="cuda")


def test_explicit_triton_on_cpu_tensors_is_refused(monkeypatch):
    monkeypatch.setattr(_backend, "interpreted", lambda: False)
    monkeypatch.setattr(_backend, "triton_available", lambda: True)
    with pytest.raises(UsageError, match="tensors are on cpu"):
        use_triton("triton", torch.zeros(1))


def test_without_triton_everything_imports_and_the_references_run():
    run_python(WITHOUT_TRITON)


if triton_available():

    def test_every_kernel_compiles_for_a_gpu_on_a_machine_without_one(tmp_path):
        printed = run_python(COMPILE_EVERY_KERNEL, TRITON_CACHE_DIR=str(tmp_path))
        assert len(printed.split()) == 7

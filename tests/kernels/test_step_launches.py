"""What a step costs on a GPU, counted in Triton's interpreter: one launch, no host sync, each byte once."""

import pytest
import torch
from streamaug.kernels import step as step_module
from streamaug.kernels._backend import interpreted, triton_available
from streamaug.kernels.step import HISTORY, Column, step
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.skipif(not triton_available(), reason="Triton is not installed")
counted = pytest.mark.skipif(not interpreted(), reason="counts in the interpreter")
SHAPE = (3, 2, 5, 3)  # no multiple of a tile


class Launches(TorchDispatchMode):
    """Stands in front of the kernel: counts its launches, and records the torch operations outside it."""

    def __init__(self, kernel):
        super().__init__()
        self.kernel, self.count, self.operations = kernel, 0, []

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.count += 1
            before = list(self.operations)
            self.kernel[grid](*args, **kwargs)
            self.operations = before  # the interpreter reads tensors itself

        return launch

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations.append(str(function))
        return function(*args, **kwargs or {})


def arguments(guided: bool, used: tuple[Column, ...], device: str = "cpu") -> dict:
    batch, half = SHAPE[0], torch.float16
    coef = torch.zeros(4, batch, len(Column), device=device)
    coef[..., [*used, Column.IN_NEXT]] = 0.5
    halves = (1 + guided) * batch
    return {
        "x": torch.randn(SHAPE, device=device),
        "model_out": torch.randn(halves, *SHAPE[1:], device=device).to(half),
        "coef": coef,
        "index": torch.full((1,), 2, device=device),
        "history": torch.randn(HISTORY, *SHAPE, device=device),
        "net_in": torch.empty(halves, *SHAPE[1:], device=device, dtype=half),
        "ids": torch.arange(batch, device=device),
    }


DDIM = (Column.A, Column.S, Column.CE, Column.C0)
MULTISTEP = (Column.A, Column.S, Column.CX, Column.C0, Column.C1)


def run(given: dict, guided: bool) -> None:
    step(**given, seed=0, guided=guided, clip=1.0, noisy=False, backend="triton")


@counted
@pytest.mark.parametrize("guided", [False, True])
def test_a_step_is_one_launch_and_no_torch_operation(monkeypatch, guided):
    launches = Launches(step_module._step_kernel)
    monkeypatch.setattr(step_module, "_step_kernel", launches)
    given = arguments(guided, DDIM)
    with launches:
        run(given, guided)
    assert launches.count == 1
    assert launches.operations == []  # reading a value from the device would be one


@counted
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(("used", "past"), [(DDIM, 0), (MULTISTEP, 1)], ids=["one step", "multistep"])
def test_a_step_moves_each_byte_once(monkeypatch, guided, used, past):
    from triton.runtime import interpreter

    moved = {"read": 0, "written": 0}
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def counting_load(self, ptrs, mask, *rest):
        moved["read"] += int(mask.data.sum()) * (ptrs.dtype.element_ty.primitive_bitwidth // 8)
        return load(self, ptrs, mask, *rest)

    def counting_store(self, ptrs, value, mask, *rest):
        moved["written"] += int(mask.data.sum()) * (ptrs.dtype.element_ty.primitive_bitwidth // 8)
        return store(self, ptrs, value, mask, *rest)

    monkeypatch.setattr(builder, "create_masked_load", counting_load)
    monkeypatch.setattr(builder, "create_masked_store", counting_store)
    given = arguments(guided, used)
    run(given, guided)
    image = given["x"].nbytes
    assert moved["written"] == image + image + given["net_in"].nbytes  # x, h0, the next input
    small = given["index"].nbytes * SHAPE[0] + given["coef"][0].nbytes
    read = image + past * image + given["model_out"].nbytes
    assert read <= moved["read"] <= read + small


@pytest.mark.gpu
@pytest.mark.parametrize("guided", [False, True])
def test_a_step_does_not_wait_for_the_device(guided):
    given = arguments(guided, DDIM, "cuda")
    run(given, guided)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(given, guided)
    finally:
        torch.cuda.set_sync_debug_mode("default")

"""The fused solver step against its formula in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streamaug.kernels import step as module
from streamaug.kernels.philox import normal
from streamaug.kernels.step import HISTORY, Column, step, used_columns

from streamaug.errors import UsageError

EVALUATIONS = 7


def expected_step(x, model_out, row, evaluation, history, ids, *, seed, stream, guided, clip, noisy):
    """(x', m0) in float64; `row` is [B, len(Column)]."""
    column = {c: row[:, c].double().view(-1, *(1,) * (x.dim() - 1)) for c in Column}
    batch = len(x)
    out = model_out.double()
    e = out[:batch] + column[Column.GUIDANCE] * (out[batch:] - out[:batch]) if guided else out
    m0 = column[Column.A] * x.double() + column[Column.S] * e
    if clip is not None:
        m0 = m0.clamp(-clip, clip)
    new = column[Column.CX] * x.double() + column[Column.CE] * e + column[Column.C0] * m0
    for age, c in enumerate((Column.C1, Column.C2, Column.C3, Column.C4), 1):
        past = history[(evaluation - age) % HISTORY].double()
        new += torch.where(column[c] == 0, 0.0, column[c] * past)
    if noisy:
        noise = normal(ids, x.shape[1:], seed=seed, stream=stream, step=evaluation)
        new += column[Column.CN] * noise.double()
    return new, m0


def problem(batch, shape, guided, seed=0):
    """Random x, model outputs for every evaluation, coefficients, and a history full of NaN."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, *shape, generator=g)
    outputs = torch.randn(EVALUATIONS, batch * (2 if guided else 1), *shape, generator=g)
    coef = torch.randn(EVALUATIONS, batch, len(Column), generator=g)
    past = [Column.C1, Column.C2, Column.C3, Column.C4]
    for evaluation in range(len(past)):
        coef[evaluation, :, past[evaluation:]] = 0
    return x, outputs, coef, torch.full((HISTORY, batch, *shape), torch.nan)


def check_run(backend, device, batch, shape, *, guided, clip, noisy, dtype, twice, memory_format=None, tol=2e-5):
    x, outputs, coef, history = (t.to(device) for t in problem(batch, shape, guided))
    ids = torch.arange(batch, device=device) * 7 - 1
    index = torch.zeros(1, dtype=torch.int64, device=device)
    net_in = torch.empty(batch * (2 if twice else 1), *shape, dtype=dtype, device=device)
    if memory_format is not None:
        net_in = net_in.to(memory_format=memory_format)
    for evaluation in range(EVALUATIONS):
        model_out = outputs[evaluation].to(dtype)
        if memory_format is not None:
            model_out = model_out.to(memory_format=memory_format)
        options = {"seed": 5, "stream": 1, "guided": guided, "clip": clip, "noisy": noisy}
        expected, m0 = expected_step(
            x.cpu(), model_out.cpu(), coef[evaluation].cpu(), evaluation, history.cpu(), ids.cpu(), **options
        )
        step(x, model_out, coef, index, history, net_in, ids, **options, backend=backend)
        torch.testing.assert_close(x.cpu().double(), expected, atol=tol, rtol=tol)
        torch.testing.assert_close(history[evaluation % HISTORY].cpu().double(), m0, atol=tol, rtol=tol)
        scale = coef[evaluation, :, Column.IN_NEXT].view(-1, *(1,) * len(shape))
        for half in net_in.split(batch):
            torch.testing.assert_close(half.float(), scale * x, rtol=torch.finfo(dtype).eps, atol=1e-5)
        assert index.item() == evaluation
        index.add_(1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("guided", [False, True])
def test_every_evaluation_follows_the_formula(backend, device, dtype, guided):
    check_run(backend, device, 3, (1, 8, 8), guided=guided, clip=1.0, noisy=True, dtype=dtype, twice=guided)


@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 1, 1), (2, 23, 29), (6,)])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_odd_shapes_follow_the_formula(backend, device, shape, clip):
    check_run(backend, device, 2, shape, guided=True, clip=clip, noisy=False, dtype=torch.float32, twice=False)


@pytest.mark.parametrize("guided", [False, True])
def test_the_next_input_is_doubled_or_not_whether_or_not_this_output_was_guided(backend, device, guided):
    """At the ends of a guidance interval the batch of the network changes between two evaluations."""
    check_run(
        backend, device, 2, (1, 3, 3), guided=guided, clip=None, noisy=False, dtype=torch.float32, twice=not guided
    )


def test_channels_last_network_tensors_give_the_same_image(backend, device):
    check_run(
        backend,
        device,
        2,
        (3, 5, 6),
        guided=True,
        clip=None,
        noisy=True,
        dtype=torch.float32,
        twice=True,
        memory_format=torch.channels_last,
    )


def test_a_slice_of_the_network_output_is_accepted(backend, device):
    x, outputs, coef, history = (t.to(device) for t in problem(2, (3, 4, 4), False))
    wide = outputs[0].repeat(1, 2, 1, 1)
    ids, index = torch.arange(2, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    options = {"seed": 1, "guided": False, "clip": None, "noisy": False, "backend": backend}
    other, net_in = x.clone(), torch.empty_like(x)
    step(x, wide[:, :3], coef, index, history, net_in, ids, **options)
    step(other, outputs[0], coef, index, history, net_in, ids, **options)
    assert torch.equal(x, other)


def test_each_image_may_have_its_own_zero_coefficients(backend, device):
    """Image 0 has no past and NaN in its history, image 1 has both."""
    x, outputs, coef, history = (t.to(device) for t in problem(2, (1, 3, 3), False))
    coef[0, 1, Column.C1] = 0.5
    history[HISTORY - 1, 1] = 2.0
    net_in, ids = torch.empty_like(x), torch.arange(2, device=device)
    index = torch.zeros(1, dtype=torch.int64, device=device)
    options = {"seed": 1, "stream": 1, "guided": False, "clip": None, "noisy": False}
    expected, _ = expected_step(x.cpu(), outputs[0].cpu(), coef[0].cpu(), 0, history.cpu(), ids.cpu(), **options)
    step(x, outputs[0], coef, index, history, net_in, ids, **options, backend=backend)
    torch.testing.assert_close(x.cpu().double(), expected, atol=1e-5, rtol=1e-5)


def test_a_nan_of_the_network_passes_the_clip(backend, device):
    x, outputs, coef, history = (t.to(device) for t in problem(2, (1, 3, 3), False))
    outputs[0, 0, 0, 1, 1] = torch.nan
    net_in, ids = torch.empty_like(x), torch.arange(2, device=device)
    index = torch.zeros(1, dtype=torch.int64, device=device)
    step(
        x,
        outputs[0],
        coef,
        index,
        history,
        net_in,
        ids,
        seed=1,
        guided=False,
        clip=1.0,
        noisy=False,
        backend=backend,
    )
    assert x.isnan().nonzero().tolist() == [[0, 0, 1, 1]]
    assert history[0].isnan().nonzero().tolist() == [[0, 0, 1, 1]]


def test_noise_is_keyed_by_the_evaluation_and_the_id(backend, device):
    ids = torch.tensor([3, 8], device=device)
    coef = torch.zeros(EVALUATIONS, 2, len(Column), device=device)
    coef[:, :, Column.CN] = 1.0
    x, history = torch.zeros(2, 5, device=device), torch.zeros(HISTORY, 2, 5, device=device)
    net_in, index = torch.empty_like(x), torch.tensor([3], device=device)
    step(
        x, x, coef, index, history, net_in, ids, seed=4, stream=6, guided=False, clip=None, noisy=True,
        backend=backend,
    )  # fmt: skip
    expected = normal(ids.cpu(), (5,), seed=4, stream=6, step=3)
    torch.testing.assert_close(x.cpu(), expected, atol=1e-5, rtol=0)


@settings(max_examples=30)
@given(used=st.sets(st.sampled_from(sorted(set(Column) - {Column.GUIDANCE}))), guided=st.booleans())
def test_naming_the_used_columns_changes_nothing(used, guided):
    x, outputs, coef, _ = problem(2, (4,), guided)
    coef[:, :, [c for c in Column if c not in used and c != Column.GUIDANCE]] = 0
    columns = used_columns(coef)
    assert all((column in columns) <= (column in used | {Column.GUIDANCE}) for column in Column)
    results = []
    for named in (None, columns):
        state, history = x.clone(), torch.zeros(HISTORY, 2, 4)
        net_in, index = torch.empty(2, 4), torch.zeros(1, dtype=torch.int64)
        for evaluation in range(EVALUATIONS):
            step(
                state, outputs[evaluation], coef, index, history, net_in, torch.arange(2), seed=1,
                guided=guided, clip=1.0, noisy=True, columns=named, backend="torch",
            )  # fmt: skip
            index.add_(1)
        results.append(state)
    assert torch.equal(*results)


def test_without_noise_coefficients_no_noise_is_drawn(monkeypatch):
    monkeypatch.setattr(module, "normal", None)
    x, outputs, coef, history = problem(2, (4,), False)
    coef[:, :, Column.CN] = 0
    index = torch.zeros(1, dtype=torch.int64)
    step(
        x, outputs[0], coef, index, history, torch.empty_like(x), torch.arange(2), seed=1, guided=False,
        clip=None, noisy=True, backend="torch",
    )  # fmt: skip
    assert x.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 4, dtype=torch.float16)}, "x: expected contiguous fp32"),
        ({"model_out": torch.zeros(2, 4)}, r"model_out: expected \[4, 4\].*with guidance"),
        ({"net_in": torch.zeros(3, 4)}, "net_in: expected"),
        ({"history": torch.zeros(2, 2, 4)}, "history: expected"),
        ({"coef": torch.zeros(5, 2, 9)}, r"coef: expected .*\[E, 2, 12\]"),
        ({"index": torch.zeros((), dtype=torch.int64)}, r"index: expected int64 \[1\]"),
        ({"ids": torch.arange(3)}, r"ids: expected"),
    ],
)
def test_wrong_arguments_are_refused(changes, message):
    arguments = {
        "x": torch.zeros(2, 4),
        "model_out": torch.zeros(4, 4),
        "coef": torch.zeros(5, 2, len(Column)),
        "index": torch.zeros(1, dtype=torch.int64),
        "history": torch.zeros(HISTORY, 2, 4),
        "net_in": torch.zeros(4, 4),
        "ids": torch.arange(2),
        **changes,
    }
    with pytest.raises(UsageError, match=message):
        step(**arguments, seed=1, guided=True, clip=None, noisy=False)


@pytest.mark.gpu
def test_one_captured_graph_replays_every_evaluation():
    x, outputs, coef, history = (t.cuda() for t in problem(4, (3, 16, 16), True))
    ids, index = torch.arange(4, device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")
    net_in = torch.empty(8, 3, 16, 16, device="cuda")
    options = {"seed": 5, "guided": True, "clip": 1.0, "noisy": True}
    eager, eager_history = x.clone(), history.clone()
    for evaluation in range(EVALUATIONS):
        step(eager, outputs[evaluation], coef, index, eager_history, net_in, ids, **options)
        index.add_(1)
    index.zero_()
    model_out, graph = outputs[0].clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(x, model_out, coef, index, history, net_in, ids, **options)
        index.add_(1)
    for evaluation in range(EVALUATIONS):
        model_out.copy_(outputs[evaluation])
        graph.replay()
    assert torch.equal(x, eager)


@pytest.mark.gpu
def test_a_step_does_not_synchronise_the_device():
    x, outputs, coef, history = (t.cuda() for t in problem(4, (3, 16, 16), False))
    ids, index = torch.arange(4, device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(
            x, outputs[0], coef, index, history, torch.empty_like(x), ids, seed=1, guided=False, clip=1.0,
            noisy=True,
        )  # fmt: skip
    finally:
        torch.cuda.set_sync_debug_mode("default")

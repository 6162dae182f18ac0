"""What the kernels cost beside the plain operations they replace (on a CPU, the torch references)."""

import shutil

import pytest
import torch
from streamaug.kernels.philox import normal
from streamaug.kernels.step import HISTORY, Column, step, used_columns

DIGITS, SD = (1, 8, 8), (4, 64, 64)
BATCH = 64
STEPS = 20


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class DdimSteps:
    """The same guided DDIM steps with clipping, by the diffusers scheduler and by the fused step."""

    def __init__(self, shape: tuple[int, ...]):
        from diffusers import DDIMScheduler

        self.scheduler = DDIMScheduler()
        self.scheduler.set_timesteps(STEPS)
        self.timesteps = list(self.scheduler.timesteps)
        g = torch.Generator().manual_seed(0)
        self.first = torch.randn(BATCH, *shape, generator=g)
        self.model_out = torch.randn(2 * BATCH, *shape, generator=g)
        self.guidance = 3.0
        self.coef = self._table()
        self.columns = used_columns(self.coef)
        self.history = torch.empty(HISTORY, BATCH, *shape)
        self.net_in = torch.empty(2 * BATCH, *shape)
        self.ids = torch.arange(BATCH)
        self.index = torch.zeros(1, dtype=torch.int64)
        self.x = self.eager_x = self.first
        self.reset()

    def _table(self) -> torch.Tensor:
        coef = torch.zeros(STEPS, BATCH, len(Column))
        signals = self.scheduler.alphas_cumprod.double()
        stride = self.scheduler.config.num_train_timesteps // STEPS
        for evaluation, timestep in enumerate(self.timesteps):
            signal = signals[timestep]
            following = signals[timestep - stride] if timestep >= stride else self.scheduler.final_alpha_cumprod
            coef[evaluation, :, Column.A] = signal**-0.5
            coef[evaluation, :, Column.S] = -((1 / signal - 1) ** 0.5)
            coef[evaluation, :, Column.C0] = following**0.5
            coef[evaluation, :, Column.CE] = (1 - following) ** 0.5
        coef[..., Column.IN_NEXT] = 1
        coef[..., Column.GUIDANCE] = self.guidance
        return coef

    def reset(self) -> None:
        self.x, self.eager_x = self.first.clone(), self.first.clone()
        self.index.zero_()
        self.evaluation = self.eager_evaluation = 0

    def fused(self) -> None:
        step(
            self.x, self.model_out, self.coef, self.index, self.history, self.net_in, self.ids, seed=0,
            guided=True, clip=1.0, noisy=False, columns=self.columns,
        )  # fmt: skip
        self._advance()

    def eager(self) -> None:
        unconditional, conditional = self.model_out.chunk(2)
        output = unconditional + self.guidance * (conditional - unconditional)
        timestep = self.timesteps[self.eager_evaluation]
        self.eager_x = self.scheduler.step(output, timestep, self.eager_x).prev_sample
        self.eager_net_in = self.scheduler.scale_model_input(torch.cat([self.eager_x] * 2), timestep)
        self.eager_evaluation = (self.eager_evaluation + 1) % STEPS

    def _advance(self) -> None:
        self.index.add_(1)
        self.evaluation += 1
        if self.evaluation == STEPS:
            self.evaluation = 0
            self.index.zero_()

    def check(self) -> None:
        for _ in range(STEPS):
            self.fused()
            self.eager()
        torch.testing.assert_close(self.x, self.eager_x, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(self.net_in, self.eager_net_in, atol=1e-4, rtol=1e-4)
        self.reset()


def _formula(x, model_out, row, m0_out, net_in):
    """The step of `DdimSteps` as one expression, for the compiler to fuse."""
    row = row.view(BATCH, len(Column), *(1,) * (x.dim() - 1))
    a, s, _, ce, c0, _, _, _, in_next, guidance, *_ = row.unbind(1)
    unconditional, conditional = model_out.chunk(2)
    e = unconditional + guidance * (conditional - unconditional)
    m0 = (a * x + s * e).clamp(-1.0, 1.0)
    new = ce * e + c0 * m0
    m0_out.copy_(m0)
    net_in.copy_(torch.cat([in_next * new] * 2))
    x.copy_(new)


@pytest.mark.parametrize(("suffix", "shape", "calls"), [("", DIGITS, 10), ("_sd", SD, 1)])
def test_ddim_step_over_eager(alternate, benchmark, suffix, shape, calls):
    run = DdimSteps(shape)
    run.check()
    seconds = alternate(rounds=101, calls=calls, ours=run.fused, eager=run.eager)
    benchmark.extra_info[f"ddim_step_over_eager{suffix}"] = seconds["eager"] / seconds["ours"]


if shutil.which("g++") or shutil.which("clang++"):

    def test_step_over_compile(alternate, benchmark):
        run = DdimSteps(DIGITS)
        compiled = torch.compile(_formula, fullgraph=True)

        def compiled_step() -> None:
            evaluation = int(run.index)
            compiled(run.x, run.model_out, run.coef[evaluation], run.history[evaluation % HISTORY], run.net_in)
            run._advance()

        run.fused()
        expected = run.x
        run.reset()
        with torch.no_grad():
            compiled_step()
            torch.testing.assert_close(run.x, expected, atol=1e-5, rtol=1e-5)
            seconds = alternate(rounds=101, calls=10, ours=run.fused, compiled=compiled_step)
        benchmark.extra_info["step_over_compile"] = seconds["compiled"] / seconds["ours"]


@pytest.mark.parametrize(
    ("suffix", "batch", "shape", "calls"),
    [("", BATCH, DIGITS, 10), ("_524k", 8192, DIGITS, 1), ("_sd", 32, SD, 1)],
)
def test_philox_over_randn(alternate, benchmark, suffix, batch, shape, calls):
    ids = torch.arange(batch)
    seconds = alternate(
        rounds=101,
        calls=calls,
        ours=lambda: normal(ids, shape, seed=1, stream=0),
        randn=lambda: torch.randn(batch, *shape),
    )
    benchmark.extra_info[f"philox_over_randn{suffix}"] = seconds["ours"] / seconds["randn"]

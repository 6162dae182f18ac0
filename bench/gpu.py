"""The GPU suite: `python -m bench.gpu --out DIR` measures kernels and engine in under nine minutes on one H100.

Needs torch, triton and diffusers. Each part writes DIR/gpu.json and DIR/gpu.txt as it ends; a part that fails is
recorded and the rest runs. `--device cpu --quick` runs the same code at tiny sizes. Not run on a GPU yet.
"""

import argparse
import json
import platform
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from streamaug.kernels.perturb import perturb
from streamaug.kernels.philox import normal
from streamaug.kernels.step import HISTORY, step, used_columns

from bench import networks
from bench.networks import GUIDANCE, KINDS
from streamaug.sampling.denoisers.base import LoadSettings
from streamaug.sampling.network import compiler
from streamaug.sampling.sampler import Sampler
from streamaug.sampling.solvers.table import solver_table

Row = dict[str, Any]
BATCHES = (1, 2, 8, 32, 128)
COMPILED = (2, 32)  # compiling takes up to a minute each
STEPS = {"digits": 20, "dit": 8, "sd": 5}  # every step costs the same


class Suite:
    """Device, sizes and the clock. quick: tiny sizes, no compiling."""

    def __init__(self, device: torch.device, quick: bool, minutes: float):
        self.device, self.quick = device, quick
        self.cuda = device.type == "cuda"
        self.dtype = torch.float16 if self.cuda else torch.float32
        self.ends = time.monotonic() + 60 * minutes
        self.compile = not quick and compiler() is not None

    @property
    def left(self) -> float:
        return self.ends - time.monotonic()

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, functions: dict[str, Callable[[], object]], calls: int = 1) -> dict[str, float]:
        """Median seconds of one call of each, measured alternately for about two seconds."""
        samples: dict[str, list[float]] = {name: [] for name in functions}
        for function in functions.values():
            function()
        began = time.perf_counter()
        while len(next(iter(samples.values()))) < 3 or (time.perf_counter() - began < 2 and not self.quick):
            for name, function in functions.items():
                self.synchronize()
                start = time.perf_counter()
                for _ in range(calls):
                    function()
                self.synchronize()
                samples[name].append((time.perf_counter() - start) / calls)
        return {name: statistics.median(values) for name, values in samples.items()}

    def sampler(
        self, kind: str, steps: int, dtype: torch.dtype, *, guided: bool, compiled: bool = False, plain: bool = False
    ) -> Sampler:
        """Ours as shipped; plain: without channels_last and graphs."""
        network = networks.build(kind, small=self.quick, classes=guided).to(dtype)
        null_class = networks.CLASSES if kind == "digits" else None
        settings = LoadSettings(self.device, dtype, channels_last=not plain, compile=compiled, null_class=null_class)
        denoiser = networks.denoiser(kind, network, settings)
        return Sampler(denoiser, networks.scheduler(kind), steps, graph=self.cuda and not plain)

    def latents(self, kind: str, size: int) -> torch.Tensor:
        return networks.latents(kind, size, small=self.quick).to(self.device)


def parity(suite: Suite) -> Iterator[Row]:
    """Largest difference in standard deviations; in half precision, the mean one in grey levels (a range of 255)."""
    torch.backends.cudnn.allow_tf32 = False
    for kind in KINDS:
        for guided in (False, True):
            x, steps = suite.latents(kind, 2), 4
            network = networks.build(kind, small=suite.quick, classes=guided).to(suite.device)
            theirs = networks.loop(kind, network, x, steps, guided)()
            results = {
                "fp32": networks.ours(suite.sampler(kind, steps, torch.float32, guided=guided, plain=True), x, guided),
                "graph": networks.ours(suite.sampler(kind, steps, torch.float32, guided=guided), x, guided),
                "half": networks.ours(suite.sampler(kind, steps, suite.dtype, guided=guided), x, guided),
            }
            row: Row = {"kind": kind, "guided": guided}
            for name in ("fp32", "graph"):
                row[f"{name}_error"] = ((results[name]() - theirs).abs().max() / theirs.std()).item()
            row["graph_repeats_bits"] = torch.equal(results["graph"](), results["graph"]())
            row["half_grey_levels"] = ((results["half"]() - theirs).abs().mean() * 127.5).item()
            row["ok"] = max(row["fp32_error"], row["graph_error"]) < 1e-3 and row["half_grey_levels"] < 2
            yield row
    torch.backends.cudnn.allow_tf32 = True


def kernels(suite: Suite) -> Iterator[Row]:
    """Each kernel beside eager torch, torch.compile of its formula and a plain copy of the bytes it moves."""
    shapes = [(2, 1, 4, 4)] if suite.quick else [(8, 4, 64, 64), (64, 1, 8, 8), (64, 4, 64, 64), (512, 4, 64, 64)]
    for shape in shapes:
        for name, measured in (("step", _step), ("philox", _philox), ("perturb", _perturb)):
            functions, moved = measured(suite, shape)
            source = torch.zeros(max(moved // 2, 1), dtype=torch.uint8, device=suite.device)
            target = torch.empty_like(source)
            functions["copy"] = lambda source=source, target=target: target.copy_(source)
            seconds = suite.seconds(functions, calls=2 if suite.quick else 50)
            row: Row = {"kernel": name, "shape": list(shape), "bytes": moved, "ours_us": seconds["ours"] * 1e6}
            row["gb_s"] = moved / seconds["ours"] / 1e9
            for other in seconds.keys() - {"ours"}:
                row[f"{other}_over_ours"] = seconds[other] / seconds["ours"]
            yield row


def _step(suite: Suite, shape: tuple[int, ...]) -> tuple[dict[str, Callable[[], object]], int]:
    """Guided DDIM with clipping; half-precision model output and input."""
    batch, device = shape[0], suite.device
    solver = type(networks.scheduler("digits")).from_config(networks.scheduler("digits").config)
    solver.set_timesteps(20, device=device)
    coef = torch.from_numpy(solver_table(solver, 20).coef).to(device, torch.float32)[:, None].repeat(1, batch, 1)
    x, out = torch.randn(shape, device=device), torch.randn(2 * batch, *shape[1:], device=device, dtype=suite.dtype)
    history, given = torch.zeros(HISTORY, *shape, device=device), torch.empty_like(out)
    ids, index = torch.arange(batch, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    columns, timestep = used_columns(coef), solver.timesteps[3]
    half = x.to(suite.dtype)

    def ours() -> None:
        step(
            x, out, coef, index, history, given, ids, seed=0, guided=True, clip=1.0, noisy=False, columns=columns
        )  # fmt: skip

    def eager() -> torch.Tensor:
        unconditional, conditional = out.chunk(2)
        guided = unconditional + GUIDANCE * (conditional - unconditional)
        after = solver.step(guided, timestep, half, return_dict=False)[0]
        return solver.scale_model_input(torch.cat([after] * 2), timestep)

    def formula(x: torch.Tensor, out: torch.Tensor, row: torch.Tensor, given: torch.Tensor) -> None:
        a, s, cx, ce, c0 = (value.view(-1, 1, 1, 1) for value in row[:, :5].unbind(1))
        unconditional, conditional = out.float().chunk(2)
        e = unconditional + GUIDANCE * (conditional - unconditional)
        new = cx * x + ce * e + c0 * (a * x + s * e).clamp(-1, 1)
        given.copy_(torch.cat([new, new]))
        x.copy_(new)

    functions: dict[str, Callable[[], object]] = {"ours": ours, "eager": eager}
    if suite.compile:
        compiled = torch.compile(formula, dynamic=False)
        functions["compiled"] = lambda: compiled(x, out, coef[0], given)
    # x in and out, h0, the network's output and its next input
    return functions, x.nbytes * 3 + out.nbytes + given.nbytes


def _philox(suite: Suite, shape: tuple[int, ...]) -> tuple[dict[str, Callable[[], object]], int]:
    ids, out = torch.arange(shape[0], device=suite.device), torch.empty(shape, device=suite.device)
    ours = lambda: normal(ids, shape[1:], seed=0, stream=0, out=out)  # noqa: E731
    return {"ours": ours, "eager": lambda: torch.randn(shape, device=suite.device)}, out.nbytes


def _perturb(suite: Suite, shape: tuple[int, ...]) -> tuple[dict[str, Callable[[], object]], int]:
    """Two anchors, no noise, from a half-precision bank."""
    batch, device = shape[0], suite.device
    bank = torch.randn(4 * batch, *shape[1:], device=device).to(suite.dtype)
    row_a, row_b = torch.randperm(4 * batch, device=device)[: 2 * batch].chunk(2)
    weights = torch.tensor([[0.7, 0.3, 0.0]], device=device).repeat(batch, 1)
    ids, out = torch.arange(batch, device=device), torch.empty(shape, device=device)

    def eager() -> torch.Tensor:
        return bank[row_a].float() * 0.7 + bank[row_b].float() * 0.3

    def ours() -> torch.Tensor:
        return perturb(bank, row_a, row_b, weights, ids, seed=0, out=out)

    functions: dict[str, Callable[[], object]] = {"ours": ours, "eager": eager}
    if suite.compile:
        functions["compiled"] = torch.compile(eager, dynamic=False)
    return functions, 2 * out.numel() * bank.element_size() + out.nbytes


def engine(suite: Suite) -> Iterator[Row]:
    """Our sampler, with and without compiling, beside diffusers' loop in the same dtype."""
    for kind in KINDS:
        steps = 2 if suite.quick else STEPS[kind]
        for guided in (False, True):
            network = networks.build(kind, small=suite.quick, classes=guided).to(suite.device).to(suite.dtype)
            samplers = {"ours": suite.sampler(kind, steps, suite.dtype, guided=guided)}
            if suite.compile and not guided:
                samplers["compiled"] = suite.sampler(kind, steps, suite.dtype, guided=guided, compiled=True)
            for size in (1, 2) if suite.quick else BATCHES:
                row: Row = {"kind": kind, "guided": guided, "batch": size}
                if suite.left < 45:
                    yield row | {"skipped": "out of time"}
                    continue
                x = suite.latents(kind, size)
                used = [name for name in samplers if name == "ours" or size in COMPILED]
                functions = {name: networks.ours(samplers[name], x, guided) for name in used}
                functions["diffusers"] = networks.loop(kind, network, x, steps, guided)
                try:
                    seconds = suite.seconds(functions)
                except torch.cuda.OutOfMemoryError:
                    yield row | {"skipped": "out of memory"}
                    continue
                row["diffusers_ms_per_step"] = 1e3 * seconds["diffusers"] / steps
                row["eager_ratio"] = seconds["diffusers"] / seconds["ours"]
                if "compiled" in seconds:
                    row["defaults_ratio"] = seconds["diffusers"] / seconds["compiled"]
                row["images_per_s"] = size / min(seconds[name] for name in used)
                yield row


def memory(suite: Suite) -> Iterator[Row]:
    """Peak bytes of one batch, weights included."""
    for kind in KINDS:
        for size in (1,) if suite.quick else (8, 32):
            x = suite.latents(kind, size)
            network = networks.build(kind, small=suite.quick, classes=True).to(suite.device).to(suite.dtype)
            row: Row = {"kind": kind, "batch": size, "guided": True}
            row["diffusers_mb"] = _peak(suite, networks.loop(kind, network, x, 2, True))
            del network
            row["ours_mb"] = _peak(suite, networks.ours(suite.sampler(kind, 2, suite.dtype, guided=True), x, True))
            yield row


def _peak(suite: Suite, function: Callable[[], object]) -> float | None:
    if not suite.cuda:
        function()
        return None
    torch.cuda.reset_peak_memory_stats(suite.device)
    function()
    return torch.cuda.max_memory_allocated(suite.device) / 1e6


PARTS: dict[str, Callable[[Suite], Iterator[Row]]] = {
    "parity": parity,
    "kernels": kernels,
    "memory": memory,
    "engine": engine,
}


def run(suite: Suite, out: Path) -> dict[str, Any]:
    """All parts, saved as each ends."""
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"hardware": _hardware(suite), "versions": _versions(), "quick": suite.quick, "parts": {}}
    for name, part in PARTS.items():
        began, rows = time.monotonic(), []
        entry: dict[str, Any] = {"rows": rows}
        report["parts"][name] = entry
        try:
            for row in part(suite):
                rows.append(row)
                print(f"{name}: {_line(row)}", flush=True)
        except Exception as error:
            entry["failed"] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        entry["seconds"] = round(time.monotonic() - began, 1)
        (out / "gpu.json").write_text(json.dumps(report, indent=2) + "\n")
        (out / "gpu.txt").write_text(_table(report))
    return report


def _hardware(suite: Suite) -> Row:
    if not suite.cuda:
        return {"device": platform.processor() or platform.machine()}
    properties = torch.cuda.get_device_properties(suite.device)
    return {"device": properties.name, "memory_gb": round(properties.total_memory / 1e9, 1)}


def _versions() -> Row:
    import diffusers
    import triton

    return {"torch": torch.__version__, "triton": triton.__version__, "diffusers": diffusers.__version__}


def _table(report: dict[str, Any]) -> str:
    """Every part's rows under its name, as text."""
    lines = [" ".join(str(value) for value in {**report["hardware"], **report["versions"]}.values())]
    for name, entry in report["parts"].items():
        lines += ["", f"{name} ({entry['seconds']} s)", *(f"  {_line(row)}" for row in entry["rows"])]
        if "failed" in entry:
            lines.append(f"  failed: {entry['failed']}")
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    return "  ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and gpu.txt")
    parser.add_argument("--device", default="cuda", help="cuda (default), cuda:1, cpu")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, no compiling: to see that it runs")
    parser.add_argument("--minutes", type=float, default=9.0, help="engine cases that would start later are skipped")
    given = parser.parse_args()
    torch.set_grad_enabled(False)
    report = run(Suite(torch.device(given.device), given.quick, given.minutes), given.out)
    raise SystemExit(any("failed" in entry for entry in report["parts"].values()))


if __name__ == "__main__":
    main()

"""The GPU suite: `python -m bench.gpu --out DIR` measures kernels, ring and engine in under nine minutes on one H100.

Needs torch, triton and diffusers, and for the ring, which is left out otherwise, pydantic. DIR/gpu.json and DIR/gpu.txt
are written anew after every case, goals beside what was found; a case that fails is recorded, one that would end too
late is skipped, and the rest runs. `--device cpu --quick` runs the same code at tiny sizes. Not run on a GPU yet.
"""

import argparse
import gc
import json
import platform
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import torch
from streamaug.kernels.emit import emit
from streamaug.kernels.perturb import perturb
from streamaug.kernels.philox import normal
from streamaug.kernels.rescale import rescale
from streamaug.kernels.step import HISTORY, step, used_columns

from bench import handoff, networks
from bench.networks import GUIDANCE, KINDS
from streamaug.sampling.denoisers.base import LoadSettings
from streamaug.sampling.network import compiler
from streamaug.sampling.sampler import Sampler
from streamaug.sampling.solvers.table import solver_table

Row = dict[str, Any]
Case = tuple[Row, Callable[[], Row], float]
"""What is measured, the measurement, and the seconds it may take."""
Functions = dict[str, Callable[[], object]]

BATCHES = (1, 2, 8, 32, 128)
COMPILED = (2, 32)  # compiling takes up to a minute and a half each
STEPS = {"digits": 20, "dit": 8, "sd": 5}  # every step costs the same
_GREY = 127.5 / 2  # grey levels of a standard deviation: an image in [-1, 1] has about half of one


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

    def seconds(self, functions: Functions, calls: int = 1) -> dict[str, float]:
        """Median seconds of one call of each, measured alternately for about a second."""
        samples: dict[str, list[float]] = {name: [] for name in functions}
        for function in functions.values():
            function()
        began = time.perf_counter()
        while len(next(iter(samples.values()))) < 3 or (time.perf_counter() - began < 1 and not self.quick):
            for name, function in functions.items():
                self.synchronize()
                start = time.perf_counter()
                for _ in range(calls):
                    function()
                self.synchronize()
                samples[name].append((time.perf_counter() - start) / calls)
        return {name: statistics.median(values) for name, values in samples.items()}

    def captured(self, functions: Functions, calls: int) -> Functions:
        """Each as a CUDA graph of so many calls: what is left without the host's part, as in the engine.

        Not "eager", which may wait for the device: a capture that fails leaves torch's random generator unusable.
        """
        graphs: Functions = {}
        for name in ("ours", "compiled", "copy") if self.cuda else ():
            if name in functions:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    for _ in range(calls):
                        functions[name]()
                graphs[name] = graph.replay
        return graphs

    def network(self, kind: str, *, guided: bool) -> Any:
        return networks.build(kind, small=self.quick, classes=guided, device=self.device)

    def sampler(
        self, kind: str, steps: int, dtype: torch.dtype, *, guided: bool, compiled: bool = False, plain: bool = False
    ) -> Sampler:
        """Ours as shipped; plain: without channels_last and graphs."""
        null_class = networks.CLASSES if kind == "digits" else None
        settings = LoadSettings(self.device, dtype, channels_last=not plain, compile=compiled, null_class=null_class)
        denoiser = networks.denoiser(kind, self.network(kind, guided=guided).to(dtype), settings)
        return Sampler(denoiser, networks.scheduler(kind), steps, graph=self.cuda and not plain)

    def latents(self, kind: str, size: int) -> torch.Tensor:
        return networks.latents(kind, size, small=self.quick).to(self.device)


def parity(suite: Suite) -> Iterator[Case]:
    """Largest difference from diffusers' loop in standard deviations; in half precision the mean, in grey levels."""
    for kind in KINDS:
        for guided in (False, True):
            yield {"kind": kind, "guided": guided}, partial(_parity, suite, kind, guided), 20


def _parity(suite: Suite, kind: str, guided: bool) -> Row:
    x, steps = suite.latents(kind, 2), 4
    allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        theirs = networks.loop(kind, suite.network(kind, guided=guided), x, steps, guided)()
        results = {
            "fp32": networks.ours(suite.sampler(kind, steps, torch.float32, guided=guided, plain=True), x, guided),
            "graph": networks.ours(suite.sampler(kind, steps, torch.float32, guided=guided), x, guided),
            "half": networks.ours(suite.sampler(kind, steps, suite.dtype, guided=guided), x, guided),
        }
        found: Row = {}
        for name in ("fp32", "graph"):
            found[f"{name}_error"] = ((results[name]() - theirs).abs().max() / theirs.std()).item()
        found["graph_repeats_bits"] = torch.equal(results["graph"](), results["graph"]())
        found["half_grey_levels"] = ((results["half"]() - theirs).abs().mean() / theirs.std() * _GREY).item()
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
    found["ok"] = max(found["fp32_error"], found["graph_error"]) < 1e-3 and found["half_grey_levels"] < 2
    return found


def kernels(suite: Suite) -> Iterator[Case]:
    """Each kernel beside eager torch, torch.compile of its formula and a plain copy of the bytes it moves.

    `ours_us` and the ratios are of calls from Python; `captured_us` and `captured_*` of calls in a CUDA graph.
    """
    shapes = [(2, 1, 4, 4)] if suite.quick else [(64, 1, 8, 8), (64, 4, 64, 64), (512, 4, 64, 64)]
    measured = {"step": _step, "philox": _philox, "perturb": _perturb, "emit": _emit, "rescale": _rescale}
    for shape in shapes:
        for name, make in measured.items():
            yield {"kernel": name, "shape": list(shape)}, partial(_kernel, suite, make, shape), 20


def _kernel(suite: Suite, make: Callable[[Suite, tuple[int, ...]], tuple[Functions, int]], shape: tuple) -> Row:
    functions, moved = make(suite, shape)
    source = torch.zeros(max(moved // 2, 1), dtype=torch.uint8, device=suite.device)
    target = torch.empty_like(source)
    functions["copy"] = lambda: target.copy_(source)
    calls = 2 if suite.quick else 50
    seconds = suite.seconds(functions, calls)
    found: Row = {"bytes": moved, "ours_us": seconds["ours"] * 1e6, "gb_s": moved / seconds["ours"] / 1e9}
    for other in seconds.keys() - {"ours"}:
        found[f"{other}_over_ours"] = seconds[other] / seconds["ours"]
    if suite.cuda:
        captured = suite.seconds(suite.captured(functions, calls))
        found["captured_us"] = captured["ours"] / calls * 1e6
        for other in captured.keys() - {"ours"}:
            found[f"captured_{other}_over_ours"] = captured[other] / captured["ours"]
    return found


def _step(suite: Suite, shape: tuple[int, ...]) -> tuple[Functions, int]:
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

    functions: Functions = {"ours": ours, "eager": eager}
    if suite.compile:
        compiled = torch.compile(formula, dynamic=False)
        functions["compiled"] = lambda: compiled(x, out, coef[0], given)
    # x in and out, m0, the network's output and its next input
    return functions, x.nbytes * 3 + out.nbytes + given.nbytes


def _philox(suite: Suite, shape: tuple[int, ...]) -> tuple[Functions, int]:
    ids, out = torch.arange(shape[0], device=suite.device), torch.empty(shape, device=suite.device)
    ours = lambda: normal(ids, shape[1:], seed=0, stream=0, out=out)  # noqa: E731
    return {"ours": ours, "eager": lambda: torch.randn(shape, device=suite.device)}, out.nbytes


def _perturb(suite: Suite, shape: tuple[int, ...]) -> tuple[Functions, int]:
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

    functions: Functions = {"ours": ours, "eager": eager}
    if suite.compile:
        functions["compiled"] = torch.compile(eager, dynamic=False)
    return functions, 2 * out.numel() * bank.element_size() + out.nbytes


def _emit(suite: Suite, shape: tuple[int, ...]) -> tuple[Functions, int]:
    """Half-precision images to bytes; every fourth is rejected."""
    decoded = torch.randn(shape, device=suite.device).to(suite.dtype)
    keep = torch.arange(shape[0], device=suite.device) % 4 != 3
    out = torch.empty(shape, dtype=torch.uint8, device=suite.device)

    def eager() -> torch.Tensor:
        passed = keep & torch.isfinite(decoded).flatten(1).all(1)
        return ((decoded[passed].float() + 1) * 127.5).clamp(0, 255).round().byte()

    # read once for the check and, where kept, once more; written where kept
    kept = int(keep.sum()) * decoded[0].numel()
    return {"ours": lambda: emit(decoded, keep, out), "eager": eager}, decoded.nbytes + kept * (
        decoded.element_size() + 1
    )


def _rescale(suite: Suite, shape: tuple[int, ...]) -> tuple[Functions, int]:
    out = torch.randn(2 * shape[0], *shape[1:], device=suite.device, dtype=suite.dtype)
    guidance = torch.full((shape[0],), GUIDANCE, device=suite.device)

    def eager() -> torch.Tensor:
        unconditional, conditional = out.chunk(2)
        guided = unconditional + GUIDANCE * (conditional - unconditional)
        axes = list(range(1, len(shape)))
        matched = guided * (conditional.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True))
        return 0.7 * matched + 0.3 * guided

    functions: Functions = {"ours": lambda: rescale(out, guidance, 0.7), "eager": eager}
    if suite.compile:
        functions["compiled"] = torch.compile(eager, dynamic=False)
    return functions, out.nbytes + 4 * out.numel() // 2


def ring(suite: Suite) -> Iterator[Case]:
    """Batches from a producer on this device to a trainer on it (`handoff`), a thread and a process."""
    for backend in ("local", "process"):
        needed = 10 if backend == "local" else 20
        for memory in ("cuda", "pinned") if suite.cuda else ("auto",):
            what = {"figure": "bandwidth", "backend": backend, "memory": memory}
            yield what, partial(_ring, suite, handoff.bandwidth, backend, memory), needed
        # Sequence numbers are in the host's memory wherever images are.
        what = {"figure": "latency", "backend": backend, "memory": "auto"}
        yield what, partial(_ring, suite, handoff.latency, backend, "auto"), needed


def _ring(suite: Suite, figure: Callable[..., Row], backend: str, memory: str) -> Row:
    if find_spec("pydantic") is None:
        return {"skipped": "needs pydantic"}
    return figure(suite.device, backend, memory, quick=suite.quick)


def engine(suite: Suite) -> Iterator[Case]:
    """Our sampler, uncompiled, beside diffusers' loop in the same dtype."""
    for kind in KINDS:
        for guided in (False, True):
            steps = 2 if suite.quick else STEPS[kind]
            made = cache(partial(_made, suite, kind, steps, guided))
            for size in (1, 2) if suite.quick else BATCHES:
                measure = partial(_engine, suite, made, kind, size, steps, guided)
                yield {"kind": kind, "guided": guided, "batch": size}, measure, 45 if size > 32 else 20
            made.cache_clear()


def compiled(suite: Suite) -> Iterator[Case]:
    """The same compiled, as a long run has it: beside diffusers' loop, these are the ratios of the defaults."""
    for kind in KINDS if suite.compile else ():
        made = cache(partial(_made, suite, kind, STEPS[kind], False, compiled=True))
        for size in COMPILED:
            measure = partial(_engine, suite, made, kind, size, STEPS[kind], False, ratio="defaults_ratio")
            yield {"kind": kind, "guided": False, "batch": size}, measure, 100 if kind == "sd" else 60
        made.cache_clear()


def _made(suite: Suite, kind: str, steps: int, guided: bool, *, compiled: bool = False) -> tuple[Any, Sampler]:
    """diffusers' network and our sampler."""
    network = suite.network(kind, guided=guided).to(suite.dtype)
    return network, suite.sampler(kind, steps, suite.dtype, guided=guided, compiled=compiled)


def _engine(
    suite: Suite,
    made: Callable[[], tuple[Any, Sampler]],
    kind: str,
    size: int,
    steps: int,
    guided: bool,
    *,
    ratio: str = "eager_ratio",
) -> Row:
    network, sampler = made()
    x = suite.latents(kind, size)
    ours, theirs = networks.ours(sampler, x, guided), networks.loop(kind, network, x, steps, guided)
    seconds = suite.seconds({"ours": ours, "diffusers": theirs})
    return {
        "diffusers_ms_per_step": 1e3 * seconds["diffusers"] / steps,
        ratio: seconds["diffusers"] / seconds["ours"],
        "images_per_s": size / seconds["ours"],
    }


def memory(suite: Suite) -> Iterator[Case]:
    """Peak bytes of one guided batch, weights included."""
    for kind in KINDS:
        for size in (1,) if suite.quick else (8, 32):
            yield {"kind": kind, "batch": size, "guided": True}, partial(_memory, suite, kind, size), 20


def _memory(suite: Suite, kind: str, size: int) -> Row:
    x = suite.latents(kind, size)
    network = suite.network(kind, guided=True).to(suite.dtype)
    found = {"diffusers_mb": _peak(suite, networks.loop(kind, network, x, 2, True))}
    del network
    _free(suite)
    found["ours_mb"] = _peak(suite, networks.ours(suite.sampler(kind, 2, suite.dtype, guided=True), x, True))
    return found


def _peak(suite: Suite, function: Callable[[], object]) -> float | None:
    if not suite.cuda:
        function()
        return None
    torch.cuda.reset_peak_memory_stats(suite.device)
    function()
    return torch.cuda.max_memory_allocated(suite.device) / 1e6


PARTS: dict[str, Callable[[Suite], Iterator[Case]]] = {
    "parity": parity,
    "kernels": kernels,
    "ring": ring,
    "engine": engine,
    "memory": memory,
    "compiled": compiled,
}


def run(suite: Suite, out: Path) -> dict[str, Any]:
    """All parts; the report is saved after every case."""
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"hardware": _hardware(suite), "versions": _versions(), "quick": suite.quick, "parts": {}}
    for name, part in PARTS.items():
        began, rows = time.monotonic(), []
        entry: dict[str, Any] = {"rows": rows}
        report["parts"][name] = entry
        for what, measure, needed in part(suite):
            row = what | _measured(suite, measure, needed)
            rows.append(row)
            print(f"{name}: {_line(row)}", flush=True)
            if "failed" in row:
                entry["failed"] = entry.get("failed", 0) + 1
            entry["seconds"] = round(time.monotonic() - began, 1)
            report["goals"] = goals(report["parts"])
            (out / "gpu.json").write_text(json.dumps(report, indent=2) + "\n")
            (out / "gpu.txt").write_text(_table(report))
    return report


def _measured(suite: Suite, measure: Callable[[], Row], needed: float) -> Row:
    if suite.left < needed:
        return {"skipped": "out of time"}
    try:
        return measure()
    except torch.cuda.OutOfMemoryError:
        return {"skipped": "out of memory"}
    except Exception as error:
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}"[:500]}
    finally:
        _free(suite)


def _free(suite: Suite) -> None:
    """A sampler and its buffers refer to each other, so that only the collector frees them and their graphs."""
    gc.collect()
    if suite.cuda:
        torch.cuda.empty_cache()


def goals(parts: dict[str, Any]) -> list[Row]:
    """What the project aims at on an H100 beside what was found: the worst case of each; met: None if not measured."""
    rows = {name: parts.get(name, {}).get("rows", []) for name in PARTS}
    steps = [row for row in rows["kernels"] if row["kernel"] == "step"]
    largest = [row for row in rows["kernels"] if row["shape"] == max(each["shape"] for each in rows["kernels"])]
    # In the engine a step is part of a graph; the scheduler's own, which cannot be, is called from Python.
    wanted: list[tuple[str, str, float, list[float | None]]] = [
        ("largest difference in fp32, standard deviations", "<=", 1e-3, _of(rows["parity"], "graph_error")),
        ("mean difference of fp16, grey levels", "<=", 2.0, _of(rows["parity"], "half_grey_levels")),
        ("step over eager scheduler.step", ">=", 4.5, _of(steps, "eager_over_ours")),
        ("step over torch.compile", ">=", 1.0, _of(steps, "captured_compiled_over_ours")),
        *(
            (f"{row['kernel']}, share of a copy's bandwidth", ">=", 0.85, _of([row], "captured_copy_over_ours"))
            for row in largest
            if row["kernel"] in ("step", "perturb", "emit")
        ),
        ("take, share of a copy's bandwidth on the device", ">=", 0.9, _of(rows["ring"], "device_copy_over_take")),
        ("take, share of a copy's bandwidth by the clock", ">=", 0.9, _of(rows["ring"], "copy_over_take")),
        ("published to seen by the trainer, median, microseconds", "<=", 100.0, _of(rows["ring"], "latency_p50_us")),
        ("synchronising calls in a take", "<=", 0.0, _of(rows["ring"], "synchronising_calls")),
        *(
            (f"defaults_ratio_b{row['batch']}, {row['kind']}", ">=", least, _of([row], "defaults_ratio"))
            for row in rows["compiled"]
            for least in ([2.0] if row["batch"] <= 2 else [1.5] if row["batch"] >= 32 else [])
        ),
    ]
    found = []
    for goal, relation, bound, values in wanted:
        known = [value for value in values if value is not None]
        worst = (max(known) if relation == "<=" else min(known)) if known else None
        met = None if worst is None else worst <= bound if relation == "<=" else worst >= bound
        found.append({"goal": goal, "wanted": f"{relation} {bound:g}", "found": worst, "met": met})
    return found


def _of(rows: list[Row], name: str) -> list[float | None]:
    return [row.get(name) for row in rows]


def _hardware(suite: Suite) -> Row:
    if not suite.cuda:
        return {"device": platform.processor() or platform.machine()}
    properties = torch.cuda.get_device_properties(suite.device)
    return {"device": properties.name, "memory_gb": round(properties.total_memory / 1e9, 1)}


def _versions() -> Row:
    import triton

    versions = {"torch": torch.__version__, "triton": triton.__version__, "diffusers": diffusers.__version__}
    return versions | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


def _table(report: dict[str, Any]) -> str:
    """The goals, then every part's rows under its name, as text."""
    lines = [" ".join(str(value) for value in {**report["hardware"], **report["versions"]}.values())]
    marks = {True: "met", False: "NOT MET", None: "not measured"}
    lines += ["", "goals"]
    for each in report["goals"]:
        value = "" if each["found"] is None else f"{each['found']:.4g} "
        lines.append(f"  {each['goal']} {each['wanted']}: {value}({marks[each['met']]})")
    for name, entry in report["parts"].items():
        lines += ["", f"{name} ({entry.get('seconds', 0)} s)", *(f"  {_line(row)}" for row in entry["rows"])]
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
    parser.add_argument("--minutes", type=float, default=9.0, help="cases that would end later are skipped")
    given = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    torch.set_grad_enabled(False)
    report = run(Suite(torch.device(given.device), given.quick, given.minutes), given.out)
    raise SystemExit(any("failed" in entry for entry in report["parts"].values()))


if __name__ == "__main__":
    main()

"""The demo's result as report.json and report.html: what was gained, how sure that is, how it was found."""

import base64
import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import yaml

from streamaug.config import Config
from streamaug.doctor import hardware, installed_versions
from streamaug.outputs import plain, write_json, write_whole


@dataclass(frozen=True)
class Arm:
    """The runs of one arm, one entry per seed: fractions correct, optimizer steps, wall-clock seconds."""

    accuracies: Sequence[float]
    steps: Sequence[int]
    seconds: Sequence[float]  # of the stream's arm: the judge's training included


@dataclass(frozen=True)
class Curve:
    """Held-out accuracy (fraction) of one run at some optimizer steps."""

    arm: str  # "real_only" or "stream"
    seed: int
    steps: Sequence[int]
    accuracy: Sequence[float]


@dataclass(frozen=True)
class Timeline:
    """Who was busy when; all times in seconds since the first run began."""

    generation: Sequence[tuple[float, float]]  # began, ended of each order batch in the producer
    training: Sequence[tuple[float, float, str]]  # began, ended, arm of each training run
    steps: Sequence[tuple[float, float]] = field(default=())  # began, ended of each step of the streamed runs
    ring_fill: Sequence[tuple[float, float]] = field(default=())  # time, share of slots ready to take
    stalls: Sequence[tuple[float, float]] = field(default=())  # began, ended of each wait of the trainer


class ArmReport(TypedDict):
    accuracy_mean: float
    accuracy_std: float
    accuracies: list[float]
    steps: int
    seconds: float


class DemoReport(TypedDict):
    """report.json. Accuracies, gains and shares are fractions; `seconds` of an arm is the mean of one run."""

    verdict: str
    data: str
    shots: int
    held_out: int
    seeds: list[int]
    real_only: ArmReport
    stream: ArmReport
    real_only_equal_time: ArmReport | None
    gains: list[float]
    gain_mean: float
    gain_ci95: list[float] | None
    images_generated: int
    images_delivered: int
    images_per_second: float
    fresh_share: float
    mean_reuse: float
    acceptance: dict[str, Any]
    stall_seconds: float
    time_to_first_batch_seconds: float | None
    seconds_total: float
    versions: dict[str, str]
    hardware: dict[str, str]
    command: str
    config: dict[str, Any]


def build_report(
    *,
    data: str,
    shots: int,
    held_out: int,
    seeds: Sequence[int],
    real_only: Arm,
    stream: Arm,
    real_only_equal_time: Arm | None = None,
    images_generated: int,
    images_delivered: int,
    images_per_second: float,
    fresh_share: float,
    mean_reuse: float,
    acceptance: float,
    acceptance_per_class: Mapping[str, float],
    stall_seconds: float,
    time_to_first_batch_seconds: float | None,
    seconds_total: float,
    command: str,
    config: Config,
) -> DemoReport:
    """Put a run's figures together: means, spread, the paired gain and its 95% interval, versions.

    Both arms hold one accuracy per entry of `seeds`, in the same order. `images_per_second` counts images
    made while the producer ran. Raises ValueError when the arms differ in length.
    """
    gains = [after - before for before, after in zip(real_only.accuracies, stream.accuracies, strict=True)]
    mean, interval = paired_interval(gains)
    return {
        "verdict": verdict(real_only.accuracies, stream.accuracies),
        "data": data,
        "shots": shots,
        "held_out": held_out,
        "seeds": list(seeds),
        "real_only": _arm_report(real_only),
        "stream": _arm_report(stream),
        "real_only_equal_time": _arm_report(real_only_equal_time) if real_only_equal_time else None,
        "gains": gains,
        "gain_mean": mean,
        "gain_ci95": list(interval) if interval else None,
        "images_generated": images_generated,
        "images_delivered": images_delivered,
        "images_per_second": images_per_second,
        "fresh_share": fresh_share,
        "mean_reuse": mean_reuse,
        "acceptance": {"overall": acceptance, "per_class": dict(acceptance_per_class)},
        "stall_seconds": stall_seconds,
        "time_to_first_batch_seconds": time_to_first_batch_seconds,
        "seconds_total": seconds_total,
        "versions": installed_versions(),
        "hardware": hardware(),
        "command": command,
        "config": config.model_dump(mode="json"),
    }


def write_report(
    report: DemoReport,
    out: Path,
    *,
    timeline: Timeline,
    curves: Sequence[Curve],
    samples_png: Path | None,
    curves_png: Path | None,
) -> None:
    """Write out/report.json (with `overlap_share`) and out/report.html (with the pictures inlined).

    Each file appears whole or not at all.
    """
    overlap = overlap_share(timeline)
    out.mkdir(parents=True, exist_ok=True)
    write_json({**report, "overlap_share": overlap}, out / "report.json")
    write_whole(out / "report.html", _page(report, overlap, curves, samples_png, curves_png).encode())


def paired_interval(gains: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Mean of the gains and Student's 95% interval of it; no interval from a single gain."""
    mean = float(np.mean(gains))
    if len(gains) < 2:
        return mean, None
    half = student_t_975(len(gains) - 1) * float(np.std(gains, ddof=1)) / math.sqrt(len(gains))
    return mean, (mean - half, mean + half)


# Student's t, 97.5% quantile, at 1 to 30 degrees of freedom.
_T_975 = (
    *(12.70620, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.30600, 2.26216, 2.22814),
    *(2.20099, 2.17881, 2.16037, 2.14479, 2.13145, 2.11991, 2.10982, 2.10092, 2.09302, 2.08596),
    *(2.07961, 2.07387, 2.06866, 2.06390, 2.05954, 2.05553, 2.05183, 2.04841, 2.04523, 2.04227),
)


def student_t_975(degrees: int) -> float:
    """The 97.5% quantile of Student's t, to 1e-5: a table, and its expansion around the normal beyond it."""
    if degrees <= len(_T_975):
        return _T_975[degrees - 1]
    z = 1.959963985
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3


def verdict(real_only: Sequence[float], stream: Sequence[float]) -> str:
    """The result in one sentence, bad news first; accuracies are fractions, paired by position."""
    mean, interval = paired_interval([after - before for before, after in zip(real_only, stream, strict=True)])
    change = f"from {np.mean(real_only):.1%} to {np.mean(stream):.1%}"
    points = f"{_signed(mean)} points of accuracy"
    if interval is None:
        lead = "Better in a single run" if mean > 0 else "No gain in a single run"
        return f"{lead}: {points}, {change}. One run cannot tell a gain from chance."
    low, high = interval
    bounds = f"95% interval {_signed(low)} to {_signed(high)}"
    if low > 0:
        return f"The stream helps: {points} ({bounds}), {change}."
    if high < 0:
        return f"Worse with the stream: {points} ({bounds}), {change}."
    lead = "No clear gain" if mean > 0 else "No gain"
    return f"{lead}: {points} ({bounds}, which includes zero), {change}."


def overlap_share(timeline: Timeline) -> float | None:
    """Share of the streamed runs' training time during which images were being made; None without runs."""
    runs = [(began, ended) for began, ended, arm in timeline.training if arm == "stream"]
    trained = sum(ended - began for began, ended in runs)
    if trained <= 0:
        return None
    busy: list[list[float]] = []  # generation as disjoint intervals
    for began, ended in sorted(timeline.generation):
        if busy and began <= busy[-1][1]:
            busy[-1][1] = max(busy[-1][1], ended)
        else:
            busy.append([began, ended])
    both = sum(max(0.0, min(b, d) - max(a, c)) for a, b in runs for c, d in busy)
    return both / trained


def _arm_report(arm: Arm) -> ArmReport:
    return {
        "accuracy_mean": float(np.mean(arm.accuracies)),
        "accuracy_std": float(np.std(arm.accuracies, ddof=1)) if len(arm.accuracies) > 1 else 0.0,
        "accuracies": [float(value) for value in arm.accuracies],
        "steps": round(float(np.mean(arm.steps))),
        "seconds": float(np.mean(arm.seconds)),
    }


def _signed(fraction: float) -> str:
    """A fraction as signed points with one decimal."""
    return f"{round(100 * fraction, 1) + 0.0:+.1f}"


# The page.


def _page(
    report: DemoReport,
    overlap: float | None,
    curves: Sequence[Curve],
    samples_png: Path | None,
    curves_png: Path | None,
) -> str:
    sections = [
        _header(report),
        _comparison(report),
        _samples(report, samples_png),
        _learning(overlap, curves, curves_png),
        _stream(report),
        _method(report),
        _reproduction(report),
    ]
    title = "streamaug demo: " + report["verdict"].split(":")[0].lower()
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def _header(report: DemoReport) -> str:
    lead, _, rest = report["verdict"].partition(": ")
    ratio = report["config"]["loader"]["ratio"]
    return f"""<header>
<h1>{_text(lead)}: <span>{_text(rest)}</span></h1>
<p>An image classifier was trained twice from the same {report["shots"]} labelled
{_plural(report["shots"], "image")} per class: once on those images alone, and once with {ratio:.0%} of every
batch made up of new images, which a diffusion model made from them <em>while the classifier trained</em>. The
new images went straight into training and were never saved. Everything was repeated
{len(report["seeds"])} {_plural(len(report["seeds"]), "time")} with other labelled images, and accuracy was
measured on {report["held_out"]:,} images that nothing had seen.</p>
</header>"""


def _comparison(report: DemoReport) -> str:
    arms: list[tuple[str, ArmReport]] = [("Real images only", report["real_only"])]
    if report["real_only_equal_time"]:
        arms.append(("Real images only, for the same time", report["real_only_equal_time"]))
    arms.append(("Real images and stream", report["stream"]))
    rows = "".join(
        f'<tr><th scope="row">{name}</th><td><strong>{arm["accuracy_mean"]:.1%}</strong></td>'
        f"<td>{100 * arm['accuracy_std']:.1f}</td>"
        f"<td>{min(arm['accuracies']):.1%} to {max(arm['accuracies']):.1%}</td>"
        f"<td>{arm['steps']:,}</td><td>{arm['seconds']:.1f} s</td></tr>"
        for name, arm in arms
    )
    gains = ", ".join(_text(_signed(gain)) for gain in report["gains"])
    return f"""<section>
<h2>Accuracy with and without the stream</h2>
<div class="wide"><table>
<thead><tr><th scope="col">Trained on</th><th scope="col">Mean accuracy</th>
<th scope="col">Std. dev. (points)</th><th scope="col">Lowest to highest</th>
<th scope="col">Training steps</th><th scope="col">Time per run</th></tr></thead>
<tbody>{rows}</tbody>
</table></div>
<p>Both arms of a repetition share the labelled images, the classifier, the classical augmentation and the
number of steps, so the gain is taken pair by pair: {gains} points. The stream's time includes training its
judge.</p>
</section>"""


def _samples(report: DemoReport, picture: Path | None) -> str:
    if picture is None:
        return ""
    description = (
        "Rows of real images, each followed by generated siblings at growing depth, marked kept or rejected, "
        "with the judge's score."
    )
    judge = (
        "A judge, which is a classifier trained on the same few labelled images, scores each one; what does "
        "not look like its class is rejected."
        if report["config"]["judge"]["enabled"]
        else "No judge looked at them in this run."
    )
    return f"""<section>
<h2>What the images look like</h2>
<figure>{_inline(picture, description)}
<figcaption>Left, a real image; beside it, images made from it. <em>Depth</em> is how much of the image was
replaced by noise before the model painted it anew: shallow ones stay close, deep ones wander.
{judge}</figcaption></figure>
</section>"""


def _learning(overlap: float | None, curves: Sequence[Curve], picture: Path | None) -> str:
    means = {arm: _mean_curve(curves, arm) for arm in ("real_only", "stream")}
    sentences = []
    final = means["real_only"][max(means["real_only"])] if means["real_only"] else math.inf
    reached = [step for step, accuracy in sorted(means["stream"].items()) if accuracy >= final]
    if reached and reached[0] < max(means["real_only"]):
        sentences.append(
            "With the stream, the mean accuracy that real images alone end at was reached after "
            f"{reached[0]:,} of {max(means['real_only']):,} steps."
        )
    if overlap is not None:
        sentences.append(
            f"While the streamed classifiers trained, the generator was at work {overlap:.0%} of the time."
        )
    if not sentences and picture is None:
        return ""
    image = _inline(
        picture,
        "Accuracy over training steps for both arms, the gain of each repetition, and a timeline of "
        "generation and training.",
    )
    rows = "".join(
        f'<tr><th scope="row">{step:,}</th><td>{means["real_only"][step]:.1%}</td>'
        f"<td>{means['stream'][step]:.1%}</td></tr>"
        for step in sorted(means["real_only"].keys() & means["stream"].keys())
    )
    table = f"""<details><summary>The mean curves as numbers</summary><div class="wide"><table>
<thead><tr><th scope="col">Step</th><th scope="col">Real images only</th>
<th scope="col">Real and stream</th></tr></thead><tbody>{rows}</tbody></table></div></details>"""
    return f"""<section>
<h2>How training went</h2>
<p>{" ".join(sentences)}</p>
<figure>{image}</figure>
{table if rows else ""}
</section>"""


def _mean_curve(curves: Sequence[Curve], arm: str) -> dict[int, float]:
    """Step to mean accuracy, at the steps that every run of the arm measured."""
    runs = [dict(zip(curve.steps, curve.accuracy, strict=True)) for curve in curves if curve.arm == arm]
    shared = set.intersection(*(set(run) for run in runs)) if runs else set()
    return {step: float(np.mean([run[step] for run in runs])) for step in sorted(shared)}


def _stream(report: DemoReport) -> str:
    delivered_rate = report["images_delivered"] / max(report["stream"]["seconds"] * len(report["seeds"]), 1e-9)
    tiles = [
        (f"{report['images_generated']:,}", "images made"),
        (f"{report['images_delivered']:,}", "images delivered to training"),
        (f"{report['images_per_second']:,.0f}/s", "made while the producer ran"),
        (f"{delivered_rate:,.0f}/s", "delivered"),
        (f"{report['fresh_share']:.0%}", "fresh: seen by training for the first time"),
        (f"{report['mean_reuse']:.2f}", "times each image was used"),
        (f"{report['acceptance']['overall']:.1%}", "accepted by the judge"),
        (f"{report['stall_seconds']:.1f} s", "training waited for images, all runs together"),
    ]
    first_batch = report["time_to_first_batch_seconds"]
    if first_batch is not None:
        tiles.append((f"{first_batch:.1f} s", "until the first batch was there"))
    cards = "".join(f"<div><dd>{value}</dd><dt>{label}</dt></div>" for value, label in tiles)
    bars = "".join(
        f'<tr><th scope="row">{_text(str(name))}</th>'
        f'<td class="bar"><span style="width:{100 * share:.1f}%"></span></td><td>{share:.1%}</td></tr>'
        for name, share in report["acceptance"]["per_class"].items()
    )
    per_class = f"""<h3>Accepted by the judge, class by class</h3>
<div class="wide"><table class="bars"><thead><tr><th scope="col">Class</th>
<th scope="col" class="bar">Share</th><th scope="col">Accepted</th></tr></thead>
<tbody>{bars}</tbody></table></div>"""
    return f"""<section>
<h2>What the stream did</h2>
<dl class="tiles">{cards}</dl>
{per_class if bars else ""}
</section>"""


def _method(report: DemoReport) -> str:
    seeds = len(report["seeds"])
    model = report["config"]["model"]["path"]
    generator = f"is {_text(model)}" if model else "was trained on the training images without their labels"
    interval = (
        f"The interval is Student's 95% interval of the {seeds} paired differences: were the experiment "
        "repeated many times, 95 of 100 such intervals would contain the true mean gain."
        if report["gain_ci95"]
        else "A single repetition gives no interval."
    )
    return f"""<section>
<h2>How it was measured</h2>
<ul>
<li><b>Data:</b> {_text(report["data"])}. The {report["held_out"]:,} test images were set apart by index and
by the hash of their pixels: none of them is among the images the generator, the bank or the judge used.</li>
<li><b>Repetitions:</b> each draws {report["shots"]} labelled {_plural(report["shots"], "image")} per class
anew (seeds {", ".join(str(seed) for seed in report["seeds"])}), inverts exactly those, and trains both arms
from them.</li>
<li><b>Fairness:</b> both arms take the same number of steps with the same augmentation. The settings are those of the
configuration below; how the bundled ones were tuned is told in the README.</li>
<li><b>The generator</b> {generator}.</li>
<li><b>Uncertainty:</b> {interval}</li>
</ul>
</section>"""


def _reproduction(report: DemoReport) -> str:
    def rows(values: Mapping[str, str]) -> str:
        cells = (f'<tr><th scope="row">{_text(key)}</th><td>{_text(value)}</td></tr>' for key, value in values.items())
        return '<table class="facts"><tbody>' + "".join(cells) + "</tbody></table>"

    settings = yaml.safe_dump(plain(report["config"]), sort_keys=False, default_flow_style=None)
    return f"""<section>
<h2>To run it again</h2>
<pre><code>{_text(report["command"])}</code></pre>
<p>The whole command took {report["seconds_total"] / 60:.1f} minutes.</p>
<details><summary>Versions and machine</summary>{rows(report["versions"])}{rows(report["hardware"])}</details>
<details><summary>Configuration</summary><pre><code>{_text(settings)}</code></pre></details>
</section>"""


def _text(value: str) -> str:
    """Escaped, with a true minus sign before numbers that stand alone."""
    return re.sub(r"(^|[\s(])-(?=\d)", "\\1\N{MINUS SIGN}", html.escape(value))


def _plural(count: int, word: str) -> str:
    return word if count == 1 else f"{word}s"


def _inline(picture: Path | None, description: str) -> str:
    if picture is None:
        return ""
    data = base64.b64encode(picture.read_bytes()).decode("ascii")
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{data}">'


_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --line: #d9dee3; --page: #ffffff;
  --card: #f5f7f9; --mark: #0b6bb0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --soft: #9aa5b1; --line: #333a42; --page: #14171a;
    --card: #1d2226; --mark: #6db8ef; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 17px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 54rem; margin: 0 auto; padding: 3rem 1.25rem 5rem; }
h1 { font-size: clamp(1.6rem, 4.5vw, 2.3rem); line-height: 1.25; letter-spacing: -0.015em;
  margin: 0 0 1rem; text-wrap: balance; }
h1 span { font-weight: 400; color: var(--soft); }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 3.25rem 0 0.75rem; }
h3 { font-size: 1rem; margin: 2rem 0 0.5rem; }
p, ul { max-width: 44rem; }
li { margin: 0.4rem 0; }
figure { margin: 1.25rem 0; }
img { display: block; width: 100%; height: auto; background: #fff; border: 1px solid var(--line);
  border-radius: 8px; }
figcaption { color: var(--soft); font-size: 0.92rem; margin-top: 0.75rem; max-width: 44rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 0.95rem; }
th, td { text-align: right; padding: 0.5rem 0.75rem; border-bottom: 1px solid var(--line); }
td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { color: var(--soft); font-weight: 500; font-size: 0.85rem; vertical-align: bottom; }
tbody th { font-weight: 400; }
.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.bars { max-width: 34rem; }
.bars td, .bars th { padding-top: 0.25rem; padding-bottom: 0.25rem; border: 0; }
th.bar { text-align: left; }
td.bar { width: 60%; }
td.bar span { display: block; height: 0.75rem; border-radius: 3px; background: var(--mark); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: 0.75rem;
  margin: 1rem 0; }
.tiles div { display: flex; flex-direction: column; background: var(--card); border-radius: 8px;
  padding: 0.9rem 1rem; }
.tiles dd { margin: 0; font-size: 1.45rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.tiles dt { color: var(--soft); font-size: 0.88rem; line-height: 1.35; }
details { margin: 0.75rem 0; }
summary { cursor: pointer; color: var(--mark); }
summary:focus-visible { outline: 2px solid var(--mark); outline-offset: 3px; border-radius: 2px; }
pre { background: var(--card); border-radius: 8px; padding: 0.9rem 1rem; overflow-x: auto; font-size: 0.85rem;
  line-height: 1.5; }
@media print { details { display: none; } }
"""

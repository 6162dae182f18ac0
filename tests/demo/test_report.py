"""The demo's report and pictures: right arithmetic, honest words, one file that needs nothing else."""

import json
import math
import os
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from streamaug.config import Config, PriorConfig
from streamaug.demo import pictures
from streamaug.demo.pictures import SampleRow, Sibling, curves_png, preview_png, samples_png
from streamaug.demo.report import (
    Arm,
    Curve,
    DemoReport,
    Timeline,
    build_report,
    overlap_share,
    paired_interval,
    student_t_975,
    verdict,
    write_report,
)
from streamaug.errors import MissingExtra, StreamaugError
from streamaug.outputs import write_json

TIMELINE = Timeline(
    generation=[(0.5 + 0.1 * i, 0.58 + 0.1 * i) for i in range(60)],
    training=[(0.0, 3.0, "real_only"), (3.2, 6.4, "stream")],
    steps=[(3.2 + 0.05 * i, 3.24 + 0.05 * i) for i in range(60)],
)
CURVES = [
    Curve(arm, seed, [10, 20, 30], [0.5, 0.7 + 0.01 * seed, top - 0.01 * seed])
    for arm, top in (("real_only", 0.86), ("stream", 0.9))
    for seed in (0, 1)
]


def report_of(real_only: list[float], stream: list[float], **changes) -> DemoReport:
    runs = len(real_only)
    values: dict = {
        "data": "digits <8x8>",
        "shots": 3,
        "held_out": 500,
        "seeds": list(range(runs)),
        "real_only": Arm(real_only, [500] * runs, [6.0] * runs),
        "stream": Arm(stream, [500] * runs, [9.0] * runs),
        "images_generated": 86_000,
        "images_delivered": 80_000,
        "images_per_second": 812.0,
        "fresh_share": 1.0,
        "mean_reuse": 1.0,
        "acceptance": 0.93,
        "acceptance_per_class": {"0": 0.9, "<b>one</b>": np.float64(0.96)},
        "stall_seconds": 0.4,
        "time_to_first_batch_seconds": 5.1,
        "seconds_total": 200.0,
        "command": "streamaug demo --set 'data.root=/a & b'",
        "config": Config(prior=PriorConfig()),
    }
    return build_report(**{**values, **changes})


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """A folder with the demo's two pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    rows = [
        SampleRow(
            name,
            image(random),
            [Sibling(image(random), f"depth {depth:.2f}", 0.3 + depth, depth < 0.6) for depth in depths],
        )
        for name, depths in (("cat", (0.2, 0.2, 0.7)), ("a very long class name " * 4, (0.2, 0.5)))
    ]
    samples_png(rows, folder / "samples.png")
    curves_png(CURVES, TIMELINE, folder / "curves.png")
    return folder


def image(random: np.random.Generator, channels: int = 1, size: int = 8) -> np.ndarray:
    return random.integers(0, 256, (channels, size, size), dtype=np.uint8)


def page_of(report: DemoReport, folder: Path, drawn: Path | None = None) -> str:
    samples, curves = (drawn / "samples.png", drawn / "curves.png") if drawn else (None, None)
    write_report(report, folder, timeline=TIMELINE, curves=CURVES, samples_png=samples, curves_png=curves)
    return (folder / "report.html").read_text("utf-8")


# The arithmetic.


def test_student_quantiles_agree_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for degrees in [*range(1, 41), 60, 120, 1000]:
        assert student_t_975(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), abs=1e-5)


def test_the_interval_is_that_of_a_paired_t_test() -> None:
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(3)
    for runs in (2, 5, 20, 40):
        before, after = random.normal(0.86, 0.02, runs), random.normal(0.88, 0.02, runs)
        mean, interval = paired_interval(list(after - before))
        expected = stats.ttest_rel(after, before).confidence_interval(0.95)
        assert mean == pytest.approx(np.mean(after - before))
        assert interval == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_one_run_has_a_gain_and_no_interval() -> None:
    report = report_of([0.86], [0.89])
    assert report["gain_ci95"] is None
    assert (report["real_only"]["accuracy_std"], report["gains"]) == (0.0, [pytest.approx(0.03)])


def test_arms_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError):
        report_of([0.86, 0.87], [0.89])


def test_the_report_has_what_it_promises() -> None:
    report = report_of([0.86, 0.88], [0.89, 0.90])
    promised = (
        "real_only stream gain_mean gain_ci95 images_generated images_delivered images_per_second "
        "fresh_share mean_reuse acceptance stall_seconds time_to_first_batch_seconds seconds_total "
        "versions command config"
    )
    assert set(promised.split()) <= set(report)
    assert set(report["stream"]) == {"accuracy_mean", "accuracy_std", "accuracies", "steps", "seconds"}
    assert report["gain_mean"] == pytest.approx(0.025)
    assert report["real_only"]["accuracy_std"] == pytest.approx(np.std([0.86, 0.88], ddof=1))
    assert set(report["acceptance"]) == {"overall", "per_class"}
    assert {"python", "streamaug", "torch", "diffusers"} <= set(report["versions"])


def test_overlap_counts_only_streamed_training_and_joins_batches_that_touch() -> None:
    timeline = Timeline(
        generation=[(0.0, 2.0), (1.0, 3.0), (3.0, 4.0), (9.0, 20.0)],
        training=[(0.0, 2.0, "real_only"), (2.0, 6.0, "stream"), (8.0, 10.0, "stream")],
    )
    assert overlap_share(timeline) == pytest.approx((2.0 + 1.0) / 6.0)
    assert overlap_share(Timeline(generation=[(0.0, 1.0)], training=[])) is None


# The words.


@pytest.mark.parametrize(
    ("real_only", "stream", "begins"),
    [
        (
            [0.86, 0.87, 0.86],
            [0.89, 0.90, 0.88],
            "The stream helps: +2.7 points of accuracy (95% interval +1.2 ",
        ),
        ([0.86, 0.87, 0.86], [0.83, 0.84, 0.83], "Worse with the stream: -3.0 points"),
        ([0.86, 0.87, 0.86], [0.87, 0.865, 0.87], "No clear gain: +0.5 points"),
        ([0.86, 0.87, 0.86], [0.86, 0.87, 0.86], "No gain: +0.0 points"),
        ([0.86, 0.87, 0.86], [0.865, 0.85, 0.86], "No gain: -0.5 points"),
        ([0.86], [0.88], "Better in a single run: +2.0 points"),
        ([0.86], [0.85], "No gain in a single run: -1.0 points"),
    ],
)
def test_the_verdict_says_bad_news_first(real_only: list[float], stream: list[float], begins: str) -> None:
    assert verdict(real_only, stream).startswith(begins)


def test_the_first_heading_of_the_page_is_the_verdict(tmp_path: Path, drawn: Path) -> None:
    page = page_of(report_of([0.87, 0.88], [0.84, 0.86]), tmp_path, drawn)
    first = re.search(r"<body>\s*<main>\s*<header>\s*<h1>(.*?)</h1>", page, re.DOTALL)
    assert first and re.sub("<.*?>", "", first.group(1)).startswith("No gain: −2.5 points of accuracy")


def test_the_page_explains_itself_to_a_stranger(tmp_path: Path, drawn: Path) -> None:
    report = report_of([0.86, 0.87], [0.89, 0.90], real_only_equal_time=Arm([0.865, 0.87], [740, 760], [9.0, 9.1]))
    page = page_of(report, tmp_path, drawn)
    for part in ("while the classifier trained", "500 images that nothing had seen", "750", "Std. dev."):
        assert part in " ".join(page.split()), part
    assert "Real images only, for the same time" in page
    assert "While the streamed classifiers trained" in page


# The page as a file.


class Checker(HTMLParser):
    """Collects what a browser would load, and tags that are not closed."""

    VOID = ("meta", "img", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.pictures: list[dict] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        given = dict(attrs)
        self.loads += [given[name] for name in ("src", "href", "data", "poster", "action") if name in given]
        assert tag not in ("script", "link", "iframe")
        if tag == "img":
            self.pictures.append(given)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_self_contained_and_well_formed(tmp_path: Path, drawn: Path) -> None:
    page = page_of(report_of([0.86, 0.87], [0.89, 0.90]), tmp_path, drawn)
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert len(checker.loads) == 2
    assert all(load.startswith("data:image/png;base64,") for load in checker.loads)
    assert all(len(picture["alt"]) > 30 for picture in checker.pictures)
    without_pictures = re.sub(r'src="data:[^"]*"', "", page)
    assert not re.search(r"https?:|url\(|@import", without_pictures)
    ElementTree.fromstring(re.sub("<meta[^>]*>|<img[^>]*>|<!doctype html>", "", page))


def test_names_and_commands_are_escaped(tmp_path: Path) -> None:
    page = page_of(report_of([0.86, 0.87], [0.89, 0.90]), tmp_path)
    assert "<b>one</b>" not in page and "&lt;b&gt;one&lt;/b&gt;" in page
    assert "/a &amp; b" in page and "digits &lt;8x8&gt;" in page


def test_the_page_does_without_pictures_curves_and_a_first_batch(tmp_path: Path) -> None:
    report = report_of([0.86], [0.89], time_to_first_batch_seconds=None, acceptance_per_class={})
    nothing = Timeline(generation=[], training=[])
    write_report(report, tmp_path, timeline=nothing, curves=[], samples_png=None, curves_png=None)
    assert "<img" not in (tmp_path / "report.html").read_text("utf-8")


def test_report_json_is_strict_json_with_the_overlap(tmp_path: Path) -> None:
    page_of(report_of([0.86, 0.87], [0.89, 0.90], images_per_second=math.inf), tmp_path)
    found = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert found["images_per_second"] is None
    assert found["acceptance"]["per_class"]["<b>one</b>"] == 0.96
    assert found["overlap_share"] == pytest.approx(overlap_share(TIMELINE))
    assert found["config"]["loader"]["ratio"] == 0.5


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "report.json"
    write_json({"old": 1}, path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StreamaugError, match=r"report\.json: cannot be written: No space left on device"):
        write_json({"new": 2}, path)
    assert json.loads(path.read_text()) == {"old": 1}
    assert [item.name for item in tmp_path.iterdir()] == ["report.json"]


# The pictures.


def colors(path: Path) -> set:
    picture = Image.open(path).convert("RGB")
    return {color for _, color in picture.getcolors(1 << 24) or []}


def rgb(text: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(text[1:]))


def test_samples_frame_kept_green_and_rejected_red(drawn: Path) -> None:
    found = colors(drawn / "samples.png")
    assert rgb(pictures.KEPT) in found and rgb(pictures.REJECTED) in found


def test_small_images_are_drawn_as_hard_pixels(tmp_path: Path) -> None:
    board = np.indices((8, 8)).sum(0) % 2 * 255
    row = SampleRow("board", board[None].astype(np.uint8), [])
    assert set(np.unique(np.asarray(pictures._tile(row.real)))) == {0, 255}
    samples_png([row], tmp_path / "samples.png")
    assert Image.open(tmp_path / "samples.png").size[1] > pictures.TILE


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 28), (3, 32), (3, 64), (1, 160), (3, 300)])
def test_images_of_any_size_fill_the_tile(channels: int, size: int) -> None:
    tile = pictures._tile(np.full((channels, size, size), 7, np.uint8))
    assert tile.size == (pictures.TILE, pictures.TILE)
    assert np.mean(np.asarray(tile) == 7) > 0.95


@pytest.mark.parametrize("count", [1, 2, 7, 32])
def test_preview_draws_any_number_of_images(count: int, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    batch = SimpleNamespace(
        images=np.stack([image(random, 3, 20) for _ in range(count)]),
        labels=np.arange(count) % 2,
        starts=np.full(count, 3),
        scores=random.random(count),
    )
    for judged in (True, False):
        preview_png(batch, tmp_path / "p.png", class_names=["Äpfel", "x" * 80], steps=12, judged=judged)
        assert Image.open(tmp_path / "p.png").size[1] > pictures.TILE


def test_curves_are_drawn_from_whatever_there_is(tmp_path: Path) -> None:
    empty = Timeline(generation=[], training=[])
    full = Timeline(TIMELINE.generation, TIMELINE.training, (), [(0.5, 0.25), (1.0, 1.0)], [(3.5, 3.6)])
    one = [Curve("real_only", 0, [10], [0.5]), Curve("stream", 0, [10], [0.6])]
    many = [Curve(arm, seed, [10, 20], [0.5, 0.6]) for arm in ("real_only", "stream") for seed in range(20)]
    for curves, timeline in (([], empty), (one, TIMELINE), (many, full), (CURVES[:1], empty)):
        curves_png(curves, timeline, tmp_path / "curves.png")
        assert Image.open(tmp_path / "curves.png").size[0] > 1000


def test_without_matplotlib_the_line_that_installs_it_is_named(monkeypatch, tmp_path: Path) -> None:
    find = pictures.importlib.util.find_spec
    monkeypatch.setattr(pictures.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    with pytest.raises(MissingExtra, match=r'pip install "streamaug\[demo\]"'):
        curves_png(CURVES, TIMELINE, tmp_path / "curves.png")

"""The pictures of demo and preview: real images and their siblings, what the stream delivers, the curves."""

import contextlib
import importlib.util
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from streamaug.demo.report import Curve, Timeline, paired_interval
from streamaug.errors import MissingExtra
from streamaug.outputs import write_whole

# Everything is drawn at twice the size it is meant to be seen at, for screens of high density.
TILE = 160  # pixels a side of one image
GAP = 20
MARGIN = 56
FRAME = 6
BODY, SMALL, TITLE = 28, 24, 40  # type sizes

PAGE, INK, SOFT, LINE = "#ffffff", "#1b1f24", "#59636e", "#d9dee3"
KEPT, REJECTED = "#1a7f4b", "#c0342b"
REAL_COLOR, STREAM_COLOR, PALE_COLOR, MAKING_COLOR, STALL_COLOR = (
    "#6b7280",
    "#0b6bb0",
    "#c7dff0",
    "#e08a00",
    "#c0342b",
)


@dataclass(frozen=True)
class Sibling:
    """One image made from a real one: what the judge thought of it, and whether it was let through."""

    image: np.ndarray  # uint8 [C, H, W]
    column: str  # the heading it stands under, such as "depth 0.50"
    score: float  # the judge's probability for the class, in [0, 1]
    kept: bool | None  # None: it was not judged


@dataclass(frozen=True)
class SampleRow:
    class_name: str
    real: np.ndarray | None  # uint8 [C, H, W]
    siblings: Sequence[Sibling]


DEPTHS = (
    "Depth: the share of the noise schedule that an image is sent back through before the model paints it again. Under "
    "each image: the probability that the judge gives to the class of its row."
)


def samples_png(
    rows: Sequence[SampleRow],
    path: Path,
    *,
    title: str = "Real images, and what was made from them",
    legend: str = DEPTHS,
) -> None:
    """Each row: a real image, then what was made from it; framed green when kept and red when not.

    Siblings of one column stand under its heading, columns in the order in which they occur. Raises ValueError without
    rows.
    """
    if not rows:
        raise ValueError("no rows to draw")
    counts: Counter[str] = Counter()
    for row in rows:
        counts |= Counter(sibling.column for sibling in row.siblings)
    columns = list(dict.fromkeys(sibling.column for row in rows for sibling in row.siblings))
    left_of: dict[str, int] = {}
    large, body, small = _font(TITLE), _font(BODY), _font(SMALL)
    named = _font(BODY, *(row.class_name for row in rows))
    names = [_fit(row.class_name, named, 300) for row in rows]
    x = real_left = MARGIN + round(max(named.getlength(name) for name in names)) + 2 * GAP
    anchored = any(row.real is not None for row in rows)
    x += TILE + 3 * GAP if anchored else 0
    for column in columns:
        left_of[column] = x
        x += counts[column] * (TILE + GAP) + GAP
    width = max(x - 2 * GAP + MARGIN, 1100)

    lines = _wrap(legend, small, width - 2 * MARGIN)
    top = MARGIN + 60 + len(lines) * 34 + 60 + 84
    row_height = TILE + 76
    canvas = Image.new("RGB", (width, top + len(rows) * row_height + MARGIN - 40), PAGE)
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, MARGIN), title, INK, large, anchor="lt")
    y = MARGIN + 66
    for line in lines:
        draw.text((MARGIN, y), line, SOFT, small, anchor="lt")
        y += 34
    y += 14
    x = MARGIN
    for kept, word in ((True, "kept"), (False, "rejected by the judge")):
        _mark(draw, x + 12, y + 12, kept)
        draw.text((x + 34, y + 12), word, KEPT if kept else REJECTED, small, anchor="lm")
        x += 34 + round(small.getlength(word)) + 40

    heading = top - 34
    if anchored:
        draw.text((real_left, heading), "real", INK, body, anchor="ls")
        draw.line([(real_left, heading + 12), (real_left + TILE, heading + 12)], LINE, 2)
    for column in columns:
        right = left_of[column] + counts[column] * (TILE + GAP) - GAP
        draw.text((left_of[column], heading), _fit(column, body, right - left_of[column]), INK, body, anchor="ls")
        draw.line([(left_of[column], heading + 12), (right, heading + 12)], LINE, 2)

    for index, row in enumerate(rows):
        y = top + index * row_height
        draw.text((MARGIN, y + TILE / 2), names[index], INK, named, anchor="lm")
        if row.real is not None:
            canvas.paste(_tile(row.real), (real_left, y))
        drawn: Counter[str] = Counter()
        for sibling in row.siblings:
            x = left_of[sibling.column] + drawn[sibling.column] * (TILE + GAP)
            drawn[sibling.column] += 1
            canvas.paste(_tile(sibling.image), (x, y))
            if sibling.kept is None:
                continue
            color = KEPT if sibling.kept else REJECTED
            outer = [x - FRAME, y - FRAME, x + TILE + FRAME - 1, y + TILE + FRAME - 1]
            draw.rectangle(outer, outline=color, width=FRAME)
            _mark(draw, x + 12, y + TILE + 32, sibling.kept)
            draw.text((x + 34, y + TILE + 32), f"{sibling.score:.2f}", color, small, anchor="lm")
    _save(path, lambda file: canvas.save(file, "PNG", optimize=True))


def preview_png(batch: Any, path: Path, *, class_names: Sequence[str], steps: int, judged: bool = True) -> None:
    """A grid of delivered images, each with its class, its depth and, when `judged`, the judge's score.

    batch: what `Stream.take` returned (images uint8 [n, C, H, W], labels, starts, scores; [n] each).
    steps: the number of solver steps of the schedule, which turns a start into a depth.
    """
    count = len(batch.labels)
    columns = min(count, max(1, round((count * 2) ** 0.5)))
    named, small = _font(BODY, *class_names), _font(SMALL)
    cell, row_height = TILE + 2 * GAP, TILE + (138 if judged else 108)
    width = 2 * MARGIN + columns * cell - 2 * GAP
    words = "Depth: the share of the noise schedule run, 1 is all noise."
    words += " Score: the judge's probability for the class." if judged else " There is no judge."
    lines = _wrap(words, small, width - 2 * MARGIN)
    top = MARGIN + len(lines) * 34 + 28
    canvas = Image.new("RGB", (width, top + -(-count // columns) * row_height + MARGIN - 36), PAGE)
    draw = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        draw.text((MARGIN, MARGIN + number * 34), line, SOFT, small, anchor="lt")
    for index in range(count):
        row, column = divmod(index, columns)
        x, y = MARGIN + column * cell, top + row * row_height
        canvas.paste(_tile(batch.images[index]), (x, y))
        name = _fit(class_names[int(batch.labels[index])], named, TILE)
        draw.text((x, y + TILE + 28), name, INK, named, anchor="lm")
        depth = (steps - int(batch.starts[index])) / steps
        draw.text((x, y + TILE + 62), f"depth {depth:.2f}", SOFT, small, anchor="lm")
        if judged:
            draw.text((x, y + TILE + 92), f"score {batch.scores[index]:.2f}", SOFT, small, anchor="lm")
    _save(path, lambda file: canvas.save(file, "PNG", optimize=True))


def require_matplotlib() -> None:
    """Raise MissingExtra now rather than after the run."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtra("matplotlib", "demo")


def curves_png(curves: Sequence[Curve], timeline: Timeline, path: Path) -> None:
    """Accuracy over steps of both arms, the gain of each seed, and who was busy when.

    Raises MissingExtra without matplotlib.
    """
    require_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    style: Any = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": SOFT,
        "axes.labelcolor": SOFT,
        "axes.titlesize": 12,
        "axes.titlelocation": "left",
        "axes.titlepad": 12,
        "text.color": INK,
        "xtick.color": SOFT,
        "ytick.color": SOFT,
    }
    with rc_context(style):
        layout = ConstrainedLayoutEngine(h_pad=0.14, w_pad=0.12, rect=(0.01, 0.005, 0.98, 0.985))
        heights = [3.4, 1.15, 1.15] + ([1.0] if timeline.ring_fill else [])
        figure = Figure(figsize=(10.5, 1.5 * sum(heights)), layout=layout, facecolor=PAGE)
        grid = figure.add_gridspec(len(heights), 3, height_ratios=heights)
        _draw_accuracy(figure.add_subplot(grid[0, :2]), curves)
        _draw_gains(figure.add_subplot(grid[0, 2]), curves)
        whole = figure.add_subplot(grid[1, :])
        ends = [span[1] for span in timeline.training] + [span[1] for span in timeline.generation]
        window = (0.0, max(ends, default=1.0))
        _draw_timeline(whole, timeline, window)
        whole.set_title("Who was busy when, the whole run")
        _explain_colors(whole, timeline)
        close = figure.add_subplot(grid[2, :])
        began, ended = _close_up(timeline)
        _draw_timeline(close, timeline, (began, ended))
        blocks = "one block is one batch of images" + (", or one training step" if timeline.steps else "")
        close.set_title(f"The same, {ended - began:.2g} seconds of it: {blocks}")
        if timeline.ring_fill:
            _draw_fill(figure.add_subplot(grid[3, :]), timeline, window)
        _save(path, lambda file: figure.savefig(file, dpi=170, format="png"))


def _save(path: Path, draw: Callable[[BytesIO], Any]) -> None:
    """Draw in memory and write the file whole."""
    file = BytesIO()
    draw(file)
    write_whole(path, file.getvalue())


def _draw_accuracy(axes: Any, curves: Sequence[Curve]) -> None:
    looks = {
        "real_only": (REAL_COLOR, "real images only"),
        "stream": (STREAM_COLOR, "real images and stream"),
    }
    for arm, (color, name) in looks.items():
        runs = [curve for curve in curves if curve.arm == arm]
        for run in runs:
            axes.plot(run.steps, 100 * np.asarray(run.accuracy), color=color, linewidth=0.8, alpha=0.35)
        if not runs:
            continue
        steps = sorted(set.intersection(*(set(run.steps) for run in runs)))
        at = [[dict(zip(run.steps, run.accuracy, strict=True))[step] for step in steps] for run in runs]
        axes.plot(steps, 100 * np.mean(at, axis=0), color=color, linewidth=2.4, label=name)
    axes.set_title("Accuracy on held-out images (thick: mean; thin: each repetition)")
    axes.set_xlabel("training step")
    axes.set_ylabel("accuracy, %")
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    shown = [100 * value for curve in curves for value in curve.accuracy[len(curve.accuracy) // 4 :]]
    if shown:
        axes.set_ylim(min(shown) - 3, min(max(shown) + 3, 100.5))
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.legend(frameon=False, loc="lower right")


def _draw_gains(axes: Any, curves: Sequence[Curve]) -> None:
    last = {(curve.arm, curve.seed): curve.accuracy[-1] for curve in curves if len(curve.accuracy)}
    seeds = [seed for arm, seed in last if arm == "real_only" and ("stream", seed) in last]
    gains = [100 * (last["stream", seed] - last["real_only", seed]) for seed in seeds]
    axes.set_title("Gain of each repetition")
    axes.set_ylabel("percentage points")
    axes.axhline(0, color=SOFT, linewidth=1)
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    if not gains:
        return
    places = [float(place) for place in range(len(gains))]
    axes.vlines(places, 0, gains, color=STREAM_COLOR, linewidth=1.2, alpha=0.5)
    axes.plot(places, gains, "o", color=STREAM_COLOR, markersize=6)
    mean, interval = paired_interval(gains)
    at = len(gains) + 0.4
    ticks, labels = places, [str(seed) for seed in seeds]
    if interval:
        error = [[mean - interval[0]], [interval[1] - mean]]
        axes.errorbar([at], [mean], yerr=error, fmt="D", color=INK, markersize=6, capsize=5, linewidth=1.6)
        ticks, labels = [*ticks, at], [*labels, "mean,\n95%"]
    if len(gains) > 10:
        ticks, labels = ticks[len(gains) :], labels[len(gains) :]
    axes.set_xticks(ticks, labels)
    axes.set_xlim(-0.6, at + 0.6)
    axes.set_xlabel("seed")


def _draw_timeline(axes: Any, timeline: Timeline, window: tuple[float, float]) -> None:
    """Generation in the upper lane, training in the lower one; there, waits are marked.

    Where steps are wide enough to be seen, the lower lane is made of them, and pale between them.
    """

    def bars(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        seen = ((max(a, window[0]), min(b, window[1])) for a, b in spans)
        return [(a, b - a) for a, b in seen if b > a]

    made = bars(timeline.generation)
    edge = 0.8 if len(made) <= 200 else 0.0
    axes.broken_barh(made, (1.15, 0.8), facecolor=MAKING_COLOR, edgecolor=PAGE, linewidth=edge)
    steps = bars(timeline.steps)
    distinct = 0 < len(steps) <= 200
    for arm, color in (("real_only", REAL_COLOR), ("stream", PALE_COLOR if distinct else STREAM_COLOR)):
        spans = bars([(a, b) for a, b, which in timeline.training if which == arm])
        axes.broken_barh(spans, (0.1, 0.8), facecolor=color, edgecolor=PAGE, linewidth=0.8)
    if distinct:
        axes.broken_barh(steps, (0.1, 0.8), facecolor=STREAM_COLOR, edgecolor=PAGE, linewidth=0.8)
    axes.broken_barh(bars(timeline.stalls), (0.1, 0.8), facecolor=STALL_COLOR)
    axes.set_ylim(0, 2.05)
    axes.set_yticks([1.55, 0.5], ["making images", "training"])
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set_xlim(*window)
    axes.set_xlabel("seconds")


def _explain_colors(axes: Any, timeline: Timeline) -> None:
    from matplotlib.patches import Patch

    looks = [(REAL_COLOR, "real only"), (STREAM_COLOR, "with stream")]
    looks += [(STALL_COLOR, "waiting for images")] if timeline.stalls else []
    handles = [Patch(color=color, label=name) for color, name in looks]
    place = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "borderaxespad": 0.2}
    axes.legend(handles=handles, ncols=3, frameon=False, **place)


def _close_up(timeline: Timeline) -> tuple[float, float]:
    """A stretch in the middle of a streamed run, short enough to tell batches and steps apart."""
    spans = [(a, b) for a, b, arm in timeline.training if arm == "stream"] or [(0.0, 1.0)]
    began, ended = spans[len(spans) // 2]

    def within(blocks: Sequence[tuple[float, float]]) -> int:
        return max(sum(a < ended and b > began for a, b in blocks), 1)

    share = min(1.0, 24 / within(timeline.generation), 60 / within(timeline.steps))
    middle, half = (began + ended) / 2, share * (ended - began) / 2
    return middle - half, middle + half


def _draw_fill(axes: Any, timeline: Timeline, window: tuple[float, float]) -> None:
    axes.set_title("Images ready for the trainer")
    axes.set_ylabel("ring fill, %")
    axes.set_xlabel("seconds")
    axes.set_xlim(*window)
    axes.set_ylim(0, 105)
    axes.set_yticks([0, 50, 100])
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    seconds, fill = np.asarray(timeline.ring_fill, dtype=float).T
    axes.fill_between(seconds, 100 * fill, step="post", color=MAKING_COLOR, alpha=0.25, linewidth=0)
    axes.step(seconds, 100 * fill, where="post", color=MAKING_COLOR, linewidth=1)


def _tile(image: np.ndarray) -> Image.Image:
    """A uint8 [C, H, W] image as an RGB square: small ones as hard pixels, large ones reduced."""
    flat = image[0] if image.shape[0] == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))
    picture = Image.fromarray(flat).convert("RGB")
    factor = -(-TILE // max(picture.size))
    if factor > 1:
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
        picture.thumbnail((TILE, TILE), Image.Resampling.BOX)
    else:
        picture.thumbnail((TILE, TILE), Image.Resampling.LANCZOS)
    square = Image.new("RGB", (TILE, TILE), LINE)
    square.paste(picture, ((TILE - picture.width) // 2, (TILE - picture.height) // 2))
    return square


def _mark(draw: ImageDraw.ImageDraw, x: float, y: float, kept: bool) -> None:
    """A check mark or a cross, 22 pixels wide, around (x, y): colour is not the only sign."""
    if kept:
        draw.line([(x - 11, y + 1), (x - 3, y + 9), (x + 11, y - 8)], KEPT, 5, joint="curve")
    else:
        draw.line([(x - 9, y - 9), (x + 9, y + 9)], REJECTED, 5)
        draw.line([(x - 9, y + 9), (x + 9, y - 9)], REJECTED, 5)


def _font(size: int, *texts: str) -> Any:
    """Pillow's own font, which knows ASCII; for other texts a wider one, where the machine has it."""
    if not all(text.isascii() for text in texts):
        for name in ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial.ttf"):
            with contextlib.suppress(OSError):
                return ImageFont.truetype(name, size)
        if matplotlib := importlib.util.find_spec("matplotlib"):
            fonts = Path(matplotlib.submodule_search_locations[0]) / "mpl-data" / "fonts" / "ttf"  # type: ignore[index]
            with contextlib.suppress(OSError):
                return ImageFont.truetype(str(fonts / "DejaVuSans.ttf"), size)
    return ImageFont.load_default(size)


def _fit(text: str, font: Any, width: float) -> str:
    """The text, cut with an ellipsis where it would be wider."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def _wrap(text: str, font: Any, width: float) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines

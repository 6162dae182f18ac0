"""What a person sees while a long command runs: phase, time left, rates, and the accuracy of both arms.

`make_view()` gives a live display on a terminal and plain lines everywhere else. A view never raises: on a
terminal that cannot draw, it says less.
"""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from streamaug.progress import clock

PLAIN_INTERVAL_SECONDS = 5.0
LIVE_REFRESHES_PER_SECOND = 4


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _rate(value: float) -> str:
    return f"{value:,.0f}/s"


def _seconds(value: float) -> str:
    return f"{value:.1f} s"


# name of a figure: (what a person reads, how it is written), in the order shown
FIGURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "images_made_per_s": ("images made", _rate),
    "images_delivered_per_s": ("images delivered", _rate),
    "ring_fill": ("ring fill", _percent),
    "fresh_share": ("fresh share", _percent),
    "acceptance": ("accepted by judge", _percent),
    "stall_seconds": ("trainer waited", _seconds),
    "real_only_accuracy": ("accuracy real only", _percent),
    "stream_accuracy": ("accuracy with stream", _percent),
}


class DemoView(Protocol):
    """What a long command reports to. Use it as a context manager; all calls come from one thread."""

    def phase(self, name: str, total: int | None = None) -> None:
        """A new phase begins, and the one before it is done. `total`: its number of units, where known."""

    def advance(self, n: int = 1, **figures: float | None) -> None:
        """`n` more units of the phase are done; `figures` as in `figures()`."""

    def figures(self, **figures: float | None) -> None:
        """Set figures: those of FIGURES, or others by any name. Shares and accuracies are fractions."""

    def note(self, text: str) -> None:
        """Say one line that stays."""

    def close(self) -> None:
        """The last phase is done. Closing twice is allowed."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def make_view() -> DemoView:
    """The live view where stderr is a UTF-8 terminal that can move its cursor, plain lines elsewhere."""
    console = Console(stderr=True)
    if sys.stderr is not None and sys.stderr.isatty() and console.is_interactive and not console.options.ascii_only:
        return RichView(console)
    return PlainView()


class _View:
    """The book-keeping that both views share: the phase, its progress and the figures."""

    def __init__(self) -> None:
        self._name: str | None = None
        self._total: int | None = None
        self._done = 0
        self._phase_began = time.monotonic()
        self._figures: dict[str, float] = {}  # replaced, never changed: the live view's thread reads it
        self._moved: set[str] = set()  # figures set during this phase

    def phase(self, name: str, total: int | None = None) -> None:
        self._end_phase("done")
        self._name, self._total, self._done = name, total, 0
        self._phase_began = time.monotonic()
        self._moved = set()
        self._changed(begins=True)

    def advance(self, n: int = 1, **figures: float | None) -> None:
        self._done += n
        self._set(figures)
        self._changed()

    def figures(self, **figures: float | None) -> None:
        self._set(figures)
        self._changed()

    def close(self) -> None:
        self._end_phase("done")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._end_phase("stopped")
        self.close()

    def _set(self, figures: dict[str, float | None]) -> None:
        merged = {**self._figures, **figures}
        self._figures = {name: float(value) for name, value in merged.items() if value is not None}
        self._moved |= figures.keys()

    def _shown_figures(self, only_moved: bool = False) -> list[tuple[str, str]]:
        """(label, value) of every figure that has been set, the known ones first."""
        figures = {name: v for name, v in self._figures.items() if not only_moved or name in self._moved}
        known = [(*FIGURES[name], figures[name]) for name in FIGURES if name in figures]
        rows = [(label, write(value)) for label, write, value in known]
        other = [(name, value) for name, value in figures.items() if name not in FIGURES]
        return rows + [(name.replace("_", " "), f"{value:.4g}") for name, value in other]

    def _seconds_left(self) -> float | None:
        if not self._total or not 0 < self._done <= self._total:
            return None
        return (time.monotonic() - self._phase_began) * (self._total - self._done) / self._done

    def _end_phase(self, how: str) -> None:
        if self._name is not None:
            self._phase_ended(self._name, how, time.monotonic() - self._phase_began)
            self._name = None

    def _changed(self, begins: bool = False) -> None:
        raise NotImplementedError

    def _phase_ended(self, name: str, how: str, seconds: float) -> None:
        raise NotImplementedError


class PlainView(_View):
    """One line at the start and end of each phase, and at most one every five seconds in between."""

    def __init__(self, file: TextIO | None = None) -> None:
        """file: where the lines go; stderr when None."""
        super().__init__()
        self._file = file
        self._began = self._last_line = time.monotonic()

    def note(self, text: str) -> None:
        self._line(text)

    def _changed(self, begins: bool = False) -> None:
        if self._name is None:
            return
        if begins:
            self._line(f"{self._name} ...")
        elif time.monotonic() - self._last_line >= PLAIN_INTERVAL_SECONDS:
            self._line(" | ".join([f"{self._name}: {self._progress()}", *self._words()]))

    def _phase_ended(self, name: str, how: str, seconds: float) -> None:
        self._line(" | ".join([f"{name}: {how} after {clock(seconds)}", *self._words()]))

    def _progress(self) -> str:
        if not self._total:
            return f"{self._done:,}" if self._done else "going on"
        left = self._seconds_left()
        share = f"{self._done:,}/{self._total:,} ({self._done / self._total:.0%})"
        return share if left is None else f"{share}, {clock(left)} left"

    def _words(self) -> list[str]:
        return [f"{label} {value}" for label, value in self._shown_figures(only_moved=True)]

    def _line(self, text: str) -> None:
        self._last_line = time.monotonic()
        file = self._file or sys.stderr
        line = f"[{self._last_line - self._began:7.1f} s] {text}\n"
        encoding = getattr(file, "encoding", None) or "utf-8"
        try:
            file.write(line.encode(encoding, "replace").decode(encoding))
            file.flush()
        except (OSError, ValueError, AttributeError):
            pass  # nobody reads any more: the work goes on


class RichView(_View):
    """A live display at the foot of a UTF-8 terminal; finished phases stay above it as lines."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self._console = console or Console(stderr=True)
        self._live: Live | None = None

    def note(self, text: str) -> None:
        self._console.print(_drawable(text), markup=False, highlight=False)

    def close(self) -> None:
        super().close()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _changed(self, begins: bool = False) -> None:
        if begins and self._live is None:
            self._live = Live(
                console=self._console,
                get_renderable=self._render,
                refresh_per_second=LIVE_REFRESHES_PER_SECOND,
                transient=True,
            )
            self._live.start()

    def _phase_ended(self, name: str, how: str, seconds: float) -> None:
        mark = ("✓", "green") if how == "done" else ("✗", "red")
        end = clock(seconds) if how == "done" else f"{how} after {clock(seconds)}"
        line = Text.assemble(mark, " ", _drawable(name), (f"  {end}", "dim"), overflow="ellipsis")
        self._console.print(line, no_wrap=True)

    def _render(self) -> Group:
        parts: list[Text | ProgressBar | Table] = [
            Text(_drawable(self._name or ""), style="bold", no_wrap=True, overflow="ellipsis")
        ]
        width = max(self._console.width, 1)
        if self._total:
            left = self._seconds_left()
            words = f" {self._done:,}/{self._total:,}"
            words += "" if left is None else f"  {clock(left)} left"
            bar = max(min(40, width - len(words)), 1)
            row = Table.grid(padding=0)
            row.add_row(
                ProgressBar(self._total, min(self._done, self._total), width=bar),
                Text(words, no_wrap=True, overflow="ellipsis"),
            )
            parts.append(row)
        else:
            elapsed = time.monotonic() - self._phase_began
            parts.append(Text(clock(elapsed) + (f"  {self._done:,}" if self._done else ""), style="dim"))
        figures = self._shown_figures()
        if figures:
            parts.append(self._table(figures, 2 if width >= 72 else 1))
        return Group(*parts)

    def _table(self, figures: list[tuple[str, str]], pairs: int) -> Table:
        """The figures in `pairs` columns of (label, value), filled downwards."""
        table = Table.grid(padding=(0, 2, 0, 0))
        for _ in range(pairs):
            table.add_column(style="dim", no_wrap=True, overflow="ellipsis")
            table.add_column(justify="right", no_wrap=True, overflow="ellipsis")
        rows = -(-len(figures) // pairs)
        for at in range(rows):
            cells: list[Text] = []
            for label, value in figures[at::rows]:
                cells += [Text(_drawable(label)), Text(_drawable(value))]
            table.add_row(*cells)
        return table


def _drawable(text: str) -> str:
    """The text without what UTF-8 cannot hold, such as the undecodable bytes of a file name."""
    return text.encode("utf-8", "replace").decode("utf-8")

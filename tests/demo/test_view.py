"""The views of a long command, on every kind of terminal."""

import io
import os
import subprocess
import sys

import pytest
from rich.console import Console

from streamaug.demo import view as views
from streamaug.demo.view import FIGURES, DemoView, PlainView, RichView, make_view


def tell(view: DemoView) -> None:
    """What a demo reports, from beginning to end."""
    with view:
        view.note("data: /a [bold]b[/bold] naïve \udcff")
        view.phase("training the prior", total=20)
        for _ in range(25):
            view.advance()
        view.phase("seed 1 of 2: real images and the stream", total=None)
        view.advance(3, **dict.fromkeys(FIGURES, 0.5), loss=0.25)
        view.figures(stream_accuracy=None)
    view.close()


def terminal(width: int, height: int) -> Console:
    file = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    return Console(
        file=file, width=width, height=height, force_terminal=True, force_interactive=True, _environ={"TERM": "xterm"}
    )


def written(console: Console) -> str:
    console.file.flush()
    return console.file.buffer.getvalue().decode()  # type: ignore[attr-defined]


@pytest.mark.parametrize("height", [1, 3, 30])
@pytest.mark.parametrize("width", [1, 2, 9, 20, 71, 72, 200])
def test_the_live_view_fits_any_terminal(width: int, height: int) -> None:
    tell(RichView(terminal(width, height)))


def test_the_live_view_shows_phase_time_left_rates_and_both_accuracies() -> None:
    console = terminal(100, 30)
    view = RichView(console)
    with view:
        view.phase("seed 1 of 5: stream", total=100)
        view.advance(50, images_made_per_s=412.4, ring_fill=0.75, real_only_accuracy=0.867, stream_accuracy=0.8912)
        view._live.refresh()  # type: ignore[union-attr]
        text = written(console)
    for part in ("seed 1 of 5: stream", "50/100", " s left", "412/s", "75.0%", "86.7%", "89.1%"):
        assert part in text


def test_finished_phases_stay_above_the_live_display_and_markup_is_left_alone() -> None:
    console = terminal(100, 30)
    tell(RichView(console))
    text = written(console)
    assert "✓" in text and "training the prior" in text and "/a [bold]b[/bold]" in text


def fail_in(view: DemoView) -> None:
    with view:
        view.phase("training", total=3)
        raise RuntimeError


def test_a_phase_that_an_error_ends_is_not_called_done() -> None:
    console, file = terminal(100, 30), io.StringIO()
    for view in (RichView(console), PlainView(file)):
        with pytest.raises(RuntimeError):
            fail_in(view)
    assert "✗" in written(console) and "✓" not in written(console)
    assert "training: stopped after" in file.getvalue()


def test_the_plain_view_writes_a_line_at_both_ends_of_a_phase_and_little_between(monkeypatch) -> None:
    file = io.StringIO()
    clock = [100.0]
    monkeypatch.setattr(views.time, "monotonic", lambda: clock[0])
    view = PlainView(file)
    view.phase("training", total=1000)
    for _ in range(1000):
        clock[0] += 0.012
        view.advance(1, stream_accuracy=0.9)
    view.close()
    lines = file.getvalue().splitlines()
    assert lines[0].endswith("training ...")
    assert [line for line in lines if "left" in line] == lines[1:-1] and len(lines) == 4
    assert "(42%), 7.0 s left | accuracy with stream 90.0%" in lines[1]
    assert "training: done after 12 s | accuracy with stream 90.0%" in lines[-1]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_the_plain_view_writes_in_any_encoding(encoding: str) -> None:
    tell(PlainView(io.TextIOWrapper(io.BytesIO(), encoding=encoding)))


def test_the_plain_view_goes_on_when_nobody_reads() -> None:
    file = io.StringIO()
    file.close()
    tell(PlainView(file))


def test_the_plain_view_says_only_the_figures_of_its_phase(monkeypatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(views.time, "monotonic", lambda: 100.0)
    with PlainView(file) as view:
        view.phase("one")
        view.advance(1, loss=0.5)
        view.phase("two")
    assert file.getvalue().splitlines()[-1].endswith("two: done after 0.0 s")


def test_without_a_terminal_the_view_is_plain(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert isinstance(make_view(), PlainView)


SCRIPT = """
import sys
from streamaug.demo.view import make_view
view = make_view()
with view:
    view.phase("training \\u2713", total=2)
    view.advance()
print(type(view).__name__)
"""


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TERM": "xterm-256color"}, "RichView"),
        ({"TERM": "dumb"}, "PlainView"),
        ({"TERM": "xterm", "PYTHONIOENCODING": "ascii"}, "PlainView"),
        ({"TERM": "xterm", "COLUMNS": "2", "LINES": "1"}, "RichView"),
    ],
)
def test_a_real_terminal_gets_the_view_it_can_draw(environment: dict[str, str], expected: str) -> None:
    pty = pytest.importorskip("pty", reason="no pseudo-terminals on this system")
    master, slave = pty.openpty()
    drop = {"NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES"}
    kept = {key: value for key, value in os.environ.items() if key not in drop}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        stdout=subprocess.PIPE,
        stderr=slave,
        env={**kept, "PYTHONUTF8": "1", **environment},
        text=True,
        timeout=120,
    )
    os.close(slave)
    os.close(master)
    assert (done.returncode, done.stdout.strip()) == (0, expected)

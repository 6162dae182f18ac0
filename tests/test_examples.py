"""The example runs before and after its one changed line, with a generator that was trained for a moment."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from streamaug.config import load
from streamaug.preparation import prepare
from streamaug.prior import prior_digest

EXAMPLE = Path(__file__).parent.parent / "examples" / "plain_pytorch.py"


@pytest.fixture(scope="module")
def ready_cache(small_overrides, tmp_path_factory) -> Path:
    """A cache in which the digits configuration finds the small prior under its own prior's name."""
    prepared = prepare(load("digits", small_overrides))
    digits = load("digits")
    folder = tmp_path_factory.mktemp("example-cache")
    shutil.copytree(prepared.model.path, folder / f"prior-{prior_digest(prepared.splits.unlabelled, digits.prior)}")
    return folder


@pytest.mark.parametrize("arguments", [[], ["--real-only"]], ids=["with the stream", "real images only"])
def test_the_plain_script_runs(arguments, ready_cache, tmp_path):
    script = EXAMPLE.read_text()
    assert "64 * 500" in script
    short = tmp_path / "plain_pytorch.py"
    short.write_text(script.replace("64 * 500", "64 * 100"))
    done = subprocess.run(
        [sys.executable, short, *arguments],
        capture_output=True,
        text=True,
        timeout=110,
        env={**os.environ, "STREAMAUG_CACHE": str(ready_cache)},
    )
    assert done.returncode == 0, done.stderr
    assert "step 100/100" in done.stdout
    assert float(done.stdout.rsplit(" ", 1)[1]) > 0.4


def test_the_readme_shows_the_line_the_example_has():
    line = 'loader = sa.StreamLoader(loader, sa.Stream.from_config("digits"), ratio=0.5)'
    assert line in EXAMPLE.read_text()
    assert f"+{line}" in (EXAMPLE.parent.parent / "README.md").read_text()

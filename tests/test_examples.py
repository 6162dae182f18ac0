"""Every example runs before and after its changed line, with a generator that was trained for a moment."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from streamaug.config import load
from streamaug.preparation import prepare
from streamaug.prior import prior_digest

EXAMPLES = Path(__file__).parent.parent / "examples"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def ready_cache(small_overrides, tmp_path_factory) -> Path:
    """A cache in which the digits configuration finds the small prior under its own prior's name."""
    prepared = prepare(load("digits", small_overrides))
    digits = load("digits")
    folder = tmp_path_factory.mktemp("example-cache")
    shutil.copytree(prepared.model.path, folder / f"prior-{prior_digest(prepared.splits.unlabelled, digits.prior)}")
    return folder


def output_of(name: str, arguments: list[str], cache: Path, folder: Path, launcher: list[str] | None = None) -> str:
    """What the example prints when it is made short: an epoch or two."""
    short = folder / name
    script = (EXAMPLES / name).read_text()
    for long, few in {"64 * 500": "64 * 100", "EPOCHS = 16": "EPOCHS = 2", "))] * 64": "))] * 16"}.items():
        script = script.replace(long, few)
    short.write_text(script)
    done = subprocess.run(
        [sys.executable, *(launcher or []), short, *arguments],
        capture_output=True,
        text=True,
        timeout=110,
        cwd=folder,
        env={**os.environ, "STREAMAUG_CACHE": str(cache), "ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("arguments", [[], ["--real-only"]], ids=["with the stream", "real images only"])
def test_the_plain_script_runs(arguments, ready_cache, tmp_path):
    out = output_of("plain_pytorch.py", arguments, ready_cache, tmp_path)
    assert "step 100/100" in out
    assert float(out.rsplit(" ", 1)[1]) > 0.4


WITH_THE_STREAM = {
    "ddp_torchrun.py": TORCHRUN,
    "with_accelerate.py": None,
    "with_lightning.py": None,
    "with_hf_trainer.py": None,
}


@pytest.mark.parametrize("name", WITH_THE_STREAM)
def test_the_script_of_each_framework_runs_with_the_stream(name, ready_cache, tmp_path):
    out = output_of(name, [], ready_cache, tmp_path, WITH_THE_STREAM[name])
    accuracy = re.search(r"accuracy on 500 held-out images: (0\.\d+)", out)
    assert accuracy and float(accuracy[1]) > 0.15


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("name", "launcher"),
    [*WITH_THE_STREAM.items(), *((name, TORCHRUN) for name in ("with_accelerate.py", "with_hf_trainer.py"))],
)
@pytest.mark.parametrize("arguments", [[], ["--real-only"]], ids=["with the stream", "real images only"])
def test_the_script_of_each_framework_runs_both_ways(name, launcher, arguments, ready_cache, tmp_path):
    assert "accuracy on 500 held-out images" in output_of(name, arguments, ready_cache, tmp_path, launcher)


def test_the_readme_shows_the_line_the_example_has():
    line = 'loader = sa.StreamLoader(loader, sa.Stream.from_config("digits"), ratio=0.5)'
    assert line in (EXAMPLES / "plain_pytorch.py").read_text()
    assert f"+{line}" in (EXAMPLES.parent / "README.md").read_text()

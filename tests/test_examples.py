"""Every example runs before and after its changed line, with a generator that was trained for a moment."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from streamaug.config import load
from streamaug.preparation import prepare

EXAMPLES = Path(__file__).parent.parent / "examples"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
OF_FRAMEWORKS = ["ddp_torchrun.py", "with_accelerate.py", "with_lightning.py", "with_hf_trainer.py"]
ALL_IN_ONE_PROCESS = """
import runpy, sys
scripts, sys.argv[1:] = sys.argv[1:], []
for script in scripts:
    print("running", script, flush=True)
    runpy.run_path(script, run_name="__main__")
"""


@pytest.fixture(scope="module")
def configuration(small_overrides, tmp_path_factory) -> Path:
    """A small configuration whose generator and bank are there already."""
    overrides = [*small_overrides, "judge.enabled=false", "model.steps=2"]
    config = load("digits", overrides)
    prepare(config)
    file = tmp_path_factory.mktemp("examples") / "small.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_defaults=True)))
    return file


def shortened(name: str, configuration: Path, folder: Path) -> Path:
    """A copy of the example that trains for a moment, on the small configuration."""
    script = (EXAMPLES / name).read_text()
    for long, short in {
        "64 * 500": "64 * 100",
        "EPOCHS = 16": "EPOCHS = 2",
        "))] * 64": "))] * 16",
        '"digits"': repr(str(configuration)),
    }.items():
        script = script.replace(long, short)
    (folder / name).write_text(script)
    return folder / name


def output_of(folder: Path, *command: object) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=110,
        cwd=folder,
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("arguments", [[], ["--real-only"]], ids=["with the stream", "real images only"])
def test_the_plain_script_runs(arguments, configuration, tmp_path):
    out = output_of(tmp_path, shortened("plain_pytorch.py", configuration, tmp_path), *arguments)
    assert "step 100/100" in out
    assert float(out.rsplit(" ", 1)[1]) > 0.4


def test_the_scripts_of_the_frameworks_run_with_the_stream(configuration, tmp_path, monkeypatch):
    """All in one process, and a producer in a thread: what takes the time is importing them."""
    small = tmp_path / "local.yaml"
    small.write_text(configuration.read_text().replace("backend: process", "backend: local"))
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}.items():
        monkeypatch.setenv(name, str(value))
    scripts = [shortened(name, small, tmp_path) for name in OF_FRAMEWORKS]
    out = output_of(tmp_path, "-c", ALL_IN_ONE_PROCESS, *scripts)
    for name, part in zip(OF_FRAMEWORKS, out.split("running ")[1:], strict=True):
        accuracy = re.search(r"accuracy on 500 held-out images: (\d\.\d+)", part)
        assert accuracy and float(accuracy[1]) > 0.2, name


@pytest.mark.matrix
@pytest.mark.parametrize("arguments", [[], ["--real-only"]], ids=["with the stream", "real images only"])
@pytest.mark.parametrize(
    ("name", "launcher"),
    [(name, []) for name in OF_FRAMEWORKS[1:]]
    + [(name, TORCHRUN) for name in ("ddp_torchrun.py", "with_accelerate.py", "with_hf_trainer.py")],
)
def test_each_script_runs_both_ways_alone_and_on_two_ranks(name, launcher, arguments, configuration, tmp_path):
    out = output_of(tmp_path, *launcher, shortened(name, configuration, tmp_path), *arguments)
    assert "accuracy on 500 held-out images" in out


@pytest.mark.parametrize("name", ["plain_pytorch.py", *OF_FRAMEWORKS])
def test_the_stream_is_one_line_of_each_script(name):
    assert (EXAMPLES / name).read_text().count("# the line that changes") == 1


def test_the_readme_shows_the_line_the_example_has():
    line = 'loader = sa.StreamLoader(loader, sa.Stream.from_config("digits"), ratio=0.5)'
    assert line in (EXAMPLES / "plain_pytorch.py").read_text()
    assert f"+{line}" in (EXAMPLES.parent / "README.md").read_text()

"""Every example runs before and after its changed line, with a generator that was trained for a moment."""

import json
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
README = (EXAMPLES.parent / "README.md").read_text()
FRAMEWORKS = (EXAMPLES.parent / "docs" / "frameworks.md").read_text()
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
OF_FRAMEWORKS = {
    "torchrun": "ddp_torchrun.py",
    "Accelerate": "with_accelerate.py",
    "Lightning": "with_lightning.py",
    "Hugging Face Trainer": "with_hf_trainer.py",
}
ALL_IN_ONE_PROCESS = """
import json, runpy, sys
for script, *arguments in json.loads(sys.argv[1]):
    print("running", script, flush=True)
    sys.argv[1:] = arguments
    runpy.run_path(script, run_name="__main__")
"""


@pytest.fixture(scope="module")
def configuration(small_overrides, tmp_path_factory) -> Path:
    """A small configuration whose generator and bank are there already."""
    overrides = [*small_overrides, "judge.enabled=false", "model.steps=2", "stream.producers=1"]
    config = load("digits", overrides)
    prepare(config)
    file = tmp_path_factory.mktemp("examples") / "small.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_defaults=True)))
    return file


def shortened(name: str, configuration: Path, folder: Path) -> Path:
    """A copy of the example that trains for a moment, on the small configuration."""
    script = (EXAMPLES / name).read_text()
    for long, short in {
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
        timeout=400,
        cwd=folder,
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.timeout(500)
def test_every_script_runs_with_the_stream_and_the_plain_one_without(configuration, tmp_path, monkeypatch):
    """All in one process, as importing takes the time; the plain one reads a producer process, the others a thread."""
    small = tmp_path / "local.yaml"
    small.write_text(configuration.read_text().replace("backend: process", "backend: local"))
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}.items():
        monkeypatch.setenv(name, str(value))
    plain = str(shortened("plain_pytorch.py", configuration, tmp_path))
    runs = [[plain], [plain, "--real-only"]]
    runs += [[str(shortened(name, small, tmp_path))] for name in OF_FRAMEWORKS.values()]
    out = output_of(tmp_path, "-c", ALL_IN_ONE_PROCESS, json.dumps(runs))
    for arguments, part in zip(runs, out.split("running ")[1:], strict=True):
        accuracy = re.search(r"accuracy on 500 held-out images: (\d\.\d+)", part)
        assert accuracy and float(accuracy[1]) > 0.2, arguments


@pytest.mark.matrix
@pytest.mark.timeout(500)
@pytest.mark.parametrize("arguments", [[], ["--real-only"]], ids=["with the stream", "real images only"])
@pytest.mark.parametrize(
    ("name", "launcher"),
    [(name, []) for name in ("plain_pytorch.py", *OF_FRAMEWORKS.values()) if name != "ddp_torchrun.py"]
    + [(name, TORCHRUN) for name in ("ddp_torchrun.py", "with_accelerate.py", "with_hf_trainer.py")],
)
def test_each_script_runs_both_ways_alone_and_on_two_ranks(name, launcher, arguments, configuration, tmp_path):
    out = output_of(tmp_path, *launcher, shortened(name, configuration, tmp_path), *arguments)
    assert "accuracy on 500 held-out images" in out


@pytest.mark.parametrize("name", ["plain_pytorch.py", *OF_FRAMEWORKS.values()])
def test_the_stream_is_one_line_of_each_script(name):
    assert (EXAMPLES / name).read_text().count("# the line that changes") == 1


def lines_of(diff: str) -> list[str]:
    """What a diff shows of a script: context and new lines, without comments, elisions and indentation."""
    shown = (line[1:].split("  #")[0].strip() for line in diff.splitlines() if line[:1] in ("+", " "))
    return [line for line in shown if line and "..." not in line and not line.startswith("#")]


def shown_of_each_script() -> list[tuple[str, str, str]]:
    """(where, script, diff) for every diff of a script in the README and in docs/frameworks.md."""
    plain, frameworks = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)[:2]
    shown = [("README", "plain_pytorch.py", plain)]
    for part in re.split(r"\n(?= # )", frameworks):
        label = part.strip().splitlines()[0]
        shown += [("README", name, part) for framework, name in OF_FRAMEWORKS.items() if framework in label]
    for section in re.split(r"\n(?=## )", FRAMEWORKS):
        if names := re.findall(r"\[`examples/(\w+\.py)`\]", section):
            shown.append(("docs/frameworks.md", names[-1], section.split("```diff\n")[1].split("```")[0]))
    return shown


def test_each_script_is_shown_in_the_readme_and_in_the_docs():
    places = {"README": {"plain_pytorch.py", *OF_FRAMEWORKS.values()}, "docs/frameworks.md": {*OF_FRAMEWORKS.values()}}
    for where, names in places.items():
        assert {name for place, name, _ in shown_of_each_script() if place == where} == names


@pytest.mark.parametrize(("where", "name", "diff"), shown_of_each_script(), ids=lambda value: value.split("\n")[0][:30])
def test_what_is_shown_of_a_script_are_its_lines_in_their_order(where, name, diff):
    assert "\n+" in f"\n{diff}"
    script = [line.split("  #")[0].strip() for line in (EXAMPLES / name).read_text().splitlines()]
    at = 0
    for line in lines_of(diff):
        found = [place for place, one in enumerate(script[at:]) if one.startswith(line)]
        assert found, f"{name} has no line {line!r} after line {at}"
        at += found[0] + 1

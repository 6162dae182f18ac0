"""The command line: its help, its exit codes, what reaches the functions behind it, and how it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from streamaug.cli import app
from streamaug.config import parse
from streamaug.errors import ProducerError

run = CliRunner().invoke
VERBS = [["demo"], ["train"], ["invert"], ["preview"], ["replay"], ["doctor"], ["config", "show"], ["config", "list"]]
CONSOLE = [sys.executable, "-c", "from streamaug.cli import main; main()"]


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text("prior: {steps: 5}\ndata: {shots: 3}\nloader: {ratio: 0.5}\n")
    return path


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **members: object) -> None:
    """Put a module with these members in place of a slow one."""
    module = ModuleType(name)
    for key, value in members.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)


def demo_that(monkeypatch: pytest.MonkeyPatch, act) -> dict:
    """Replace the demo by `act()`; returns what it was called with."""
    called: dict = {}

    def run_demo(config, **options):
        called.update(options, config=config)
        act()
        return {"verdict": "The stream helps: +2.0 points."}

    stand_in(monkeypatch, "streamaug.demo.run", run_demo=run_demo)
    return called


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help_of_every_verb_shows_an_example(verb: list[str]) -> None:
    result = run(app, [*verb, "--help"])
    assert result.exit_code == 0
    assert f"Example: streamaug {' '.join(verb)}" in result.output


@pytest.mark.parametrize("verb", VERBS[:-1], ids=" ".join)
def test_every_verb_that_takes_a_configuration_takes_set(verb: list[str]) -> None:
    assert "--set" in run(app, [*verb, "--help"]).output


def test_help_loads_neither_torch_nor_the_configuration() -> None:
    code = (
        "import sys\nfrom streamaug.cli import app\ntry:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        "print({'torch', 'numpy', 'pydantic'} & set(sys.modules) or 'light')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "light"


def test_version_is_the_package_version() -> None:
    from importlib.metadata import version

    assert run(app, ["--version"]).output == f"streamaug {version('streamaug')}\n"


def test_config_list_names_the_bundled_configurations() -> None:
    assert "digits" in run(app, ["config", "list"]).output.split()


def test_config_show_prints_what_it_resolved_and_that_loads_again(digits: Path) -> None:
    result = run(app, ["config", "show", str(digits), "--set", "loader.ratio=0.25", "--set", "seed=7"])
    assert result.exit_code == 0
    values = yaml.safe_load(result.output)
    assert (values["loader"]["ratio"], values["seed"], values["prior"]["steps"]) == (0.25, 7, 5)
    assert parse(result.output).to_yaml() == result.output


def test_demo_options_reach_the_configuration_and_the_demo(monkeypatch, digits: Path, tmp_path: Path) -> None:
    called = demo_that(monkeypatch, lambda: None)
    out = tmp_path / "deep" / "out"
    options = ["--shots", "1", "--seeds", "3", "--seed", "40", "--out", str(out), "--fresh", "--full"]
    result = run(app, ["demo", str(digits), *options, "--set", "train.steps=9"])
    assert result.exit_code == 0, result.output
    config = called["config"]
    assert (config.data.shots, config.demo.seeds, config.seed, config.train.steps) == (1, 3, 40, 9)
    assert (called["out"], called["fresh"], called["full"], called["smoke"]) == (out, True, True, False)
    assert result.stdout == f"The stream helps: +2.0 points.\nReport: {out / 'report.html'}\n"


def test_invert_out_becomes_the_path_of_the_bank(monkeypatch, digits: Path, tmp_path: Path) -> None:
    seen = []

    def invert_configured(config, progress):
        seen.append(config)
        return SimpleNamespace(path=config.bank.path, num_rows=30)

    stand_in(monkeypatch, "streamaug.inverting", invert_configured=invert_configured, estimate_configured=None)
    out = tmp_path / "a bank [1]: x"
    result = run(app, ["invert", str(digits), "--out", str(out)])
    assert seen[0].bank.path == out
    assert result.stdout == f"Bank: {out} (30 images)\n"


def test_preview_writes_a_png_of_what_the_stream_delivers(monkeypatch, digits: Path, tmp_path: Path) -> None:
    from streamaug import preview

    class Stream:
        @classmethod
        def from_prepared(cls, prepared):
            return cls()

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def take(self, n: int):
            images = np.zeros((n, 1, 8, 8), np.uint8)
            return SimpleNamespace(images=images, labels=np.arange(n) % 2, starts=np.full(n, 6), scores=np.full(n, 0.5))

    planner = SimpleNamespace(schedule=SimpleNamespace(steps=12))
    prepared = SimpleNamespace(planner=planner, judge=object(), class_names=["cat", "dog"])
    sizes = []

    def prepare(config, progress):
        sizes.append(config.stream.batch_size)
        return prepared

    monkeypatch.setattr(preview, "prepare", prepare)
    monkeypatch.setattr(preview, "Stream", Stream)
    out = tmp_path / "pictures" / "preview.png"
    result = run(app, ["preview", str(digits), "--out", str(out), "--count", "5"])
    assert result.exit_code == 0, result.output
    assert Image.open(out).size[0] > 300
    assert sizes == [1], "small batches, because each has one depth"


def test_a_failure_while_running_is_one_message_and_exit_code_1(monkeypatch, digits: Path, tmp_path) -> None:
    def fail() -> None:
        raise ProducerError("producer 0 died: [bold]/a/b[/bold]")

    demo_that(monkeypatch, fail)
    result = run(app, ["demo", str(digits), "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "error: producer 0 died: [bold]/a/b[/bold]\n" in result.stderr
    assert "Traceback" not in result.stderr
    debug = run(app, ["--debug", "demo", str(digits), "--out", str(tmp_path)])
    assert debug.exit_code == 1 and "Traceback" in debug.stderr
    by_variable = run(app, ["demo", str(digits), "--out", str(tmp_path)], env={"STREAMAUG_DEBUG": "1"})
    assert "Traceback" in by_variable.stderr


def test_a_full_disk_is_one_message_and_exit_code_1(monkeypatch, digits: Path, tmp_path: Path) -> None:
    def fail() -> None:
        raise OSError(28, "No space left on device", "/data/report.json")

    demo_that(monkeypatch, fail)
    result = run(app, ["demo", str(digits), "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "error: /data/report.json: No space left on device\n" in result.stderr


def test_an_error_of_ours_keeps_its_traceback(monkeypatch, digits: Path, tmp_path: Path) -> None:
    def fail() -> None:
        raise KeyError("nothing")

    demo_that(monkeypatch, fail)
    result = run(app, ["demo", str(digits), "--out", str(tmp_path)])
    assert result.exit_code == 1 and isinstance(result.exception, KeyError)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=str
)
def test_a_signal_runs_the_clean_up_and_sets_the_exit_code(number, code, digits: Path, tmp_path: Path) -> None:
    # Short sleeps: a signal that comes just before the system call does not end it.
    script = tmp_path / "interrupted.py"
    script.write_text(
        "import sys, time\nfrom pathlib import Path\nfrom types import ModuleType\n"
        "def run_demo(config, out, **options):\n"
        "    try:\n        (out / 'begun').touch()\n        for _ in range(6000):\n            time.sleep(0.01)\n"
        "    finally:\n        (out / 'cleaned').touch()\n"
        "fake = sys.modules['streamaug.demo.run'] = ModuleType('run')\nfake.run_demo = run_demo\n"
        "from streamaug.cli import main\nmain()\n"
    )
    child = subprocess.Popen(
        [sys.executable, str(script), "demo", str(digits), "--out", str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(number)
    _, errors = child.communicate(timeout=40)
    assert child.returncode == code
    assert (tmp_path / "cleaned").exists()
    assert "Traceback" not in errors


def test_a_reader_that_leaves_early_causes_no_traceback() -> None:
    command = " ".join(f"'{part}'" for part in [*CONSOLE, "config", "show"])
    done = subprocess.run(f"{command} | head -n 1", shell=True, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("seed:")
    assert "Traceback" not in done.stderr


def test_doctor_says_ready_for_the_bundled_configuration(tmp_path: Path) -> None:
    result = run(app, ["doctor"], env={"STREAMAUG_CACHE": str(tmp_path / "not" / "yet")})
    assert result.exit_code == 0, result.output
    for word in (
        "python",
        "torch",
        "diffusers",
        "extra demo",
        "cpu threads",
        "ring memory",
        "cache",
        "model",
    ):
        assert word in result.output
    assert "ready" in result.output.splitlines()[-1]
    assert not (tmp_path / "not").exists(), "the doctor changes nothing"


def test_doctor_fails_with_what_to_do_about_each_thing_that_is_wrong(tmp_path: Path) -> None:
    wrong = {
        "model.path": str(tmp_path),
        "data.root": str(tmp_path / "none"),
        "cache": "/proc/cache",
        "stream.batch_size": "9000000000",
        "stream.memory": "shm",
        "stream.threads": "500",
    }
    options = [part for key, value in wrong.items() for part in ("--set", f"{key}={value}")]
    result = run(app, ["doctor", "digits", *options])
    assert result.exit_code == 1
    lines = result.output.splitlines()
    for name in ("ring memory", "cache", "data.root", "model"):
        at = next(i for i, line in enumerate(lines) if line.startswith("fail") and f"  {name} " in line)
        assert lines[at + 1].strip().startswith("->"), name
    assert any(line.startswith("warn  cpu threads") for line in lines)
    assert "--shm-size" in result.output


def test_doctor_knows_a_machine_without_shared_memory_and_gpu(monkeypatch, tmp_path: Path) -> None:
    import torch

    from streamaug.stream.ring import memory

    monkeypatch.setattr(memory, "SHM_FOLDER", str(tmp_path / "shm"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(app, ["doctor", "--set", f"cache={tmp_path}"]).exit_code == 0
    wanting = run(app, ["doctor", "--set", "stream.memory=shm", "--set", "model.device=cuda"])
    assert wanting.exit_code == 1
    assert "--set stream.memory=auto" in wanting.output and "--set model.device=cpu" in wanting.output


def test_doctor_names_a_package_that_is_missing_or_too_old(monkeypatch) -> None:
    from streamaug import doctor

    versions = {"torch": "2.9.1", "torchdata": "", "scikit-learn": ""}
    installed = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda package: versions.get(package, installed(package)))
    result = run(app, ["doctor"])
    assert result.exit_code == 1
    assert "2.9.1, older than 2.11" in result.output
    assert 'pip install "torchdata>=0.11"' in result.output
    assert 'pip install "streamaug[demo]"' in result.output


def test_the_environment_is_left_as_it_was() -> None:
    before = dict(os.environ)
    run(app, ["config", "show"])
    assert dict(os.environ) == before

"""Bad input: one clear message on stderr, no traceback, exit code 2, and nothing lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from streamaug.cli import app

GOOD = "prior: {}\n"
CONSOLE = [sys.executable, "-c", "from streamaug.cli import main; main()"]


def refusal(*arguments: str, env: dict[str, str] | None = None) -> str:
    """The one message with which a command refuses."""
    result = CliRunner().invoke(app, list(arguments), env=env)
    assert result.exit_code == 2, f"{result.exit_code}: {result.output}\n{result.exception!r}"
    assert "Traceback" not in result.output
    messages = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1, result.stderr
    return result.stderr[result.stderr.index("error: ") :]


def written(tmp_path: Path, text: str | bytes, name: str = "my.yaml") -> str:
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("prior: {}\nlaoder: {ratio: 0.5}\n", ["unknown key 'laoder'", "did you mean 'loader'?"]),
        ("prior: {}\nloader: {ration: 0.5}\n", ["unknown key 'loader.ration'", "did you mean 'ratio'?"]),
        ("prior: {}\ntrain: {steps: many}\n", ["train.steps", "integer", "'many'"]),
        ("prior: {}\ntrain: 5\n", ["train", "5"]),
        ("prior: {}\nloader: {ratio: 1.0}\n", ["loader.ratio", "less than 1", "1.0"]),
        ("prior: {}\nloader: {ratio: -0.1}\n", ["loader.ratio", "greater than or equal to 0"]),
        ("prior: {}\nloader: {mode: merge}\n", ["loader.mode", "'replace' or 'append'", "'merge'"]),
        ("prior: {}\nrecipes: []\n", ["recipes", "at least 1"]),
        ("prior: {}\nrecipes: [{kind: noise, depth: [0.5, 0.2]}]\n", ["recipes.0", "depth", "[0.5, 0.2]"]),
        ("prior: {}\ndata: {source: folder}\n", ["data", "root"]),
        ("seed: 1\n", ["no generator", "model.path", "prior:"]),
        ("", ["empty", "streamaug config show digits"]),
        ("# only a comment\n", ["empty"]),
        ("just words\n", ["expected sections", "just words"]),
        ("- a\n- b\n", ["expected sections", "list"]),
        ("data: [unclosed\n", ["not YAML", "line 2"]),
        ("data:\n\tshots: 3\n", ["not YAML", "line 2"]),
        ("seed: !!python/object/apply:os.system ['true']\n", ["no Python tags", "line 1"]),
        (b"\xff\xfe\x00\x01PNG", ["not a text file"]),
    ],
)
def test_a_configuration_that_cannot_be_used_is_refused(tmp_path: Path, text, parts: list[str]) -> None:
    path = written(tmp_path, text)
    message = refusal("config", "show", path)
    assert message.startswith(f"error: {path}: ")
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("loader.ratio=1.5", ["loader.ratio", "less than 1"]),
        ("loader.ratoi=0.5", ["loader.ratoi", "did you mean 'ratio'?"]),
        ("loader.ratio", ["expected key=value"]),
        ("=3", ["expected key=value"]),
        ("seed=[1", ["not a YAML value"]),
        ("recipes.9.weight=1", ["no index"]),
    ],
)
def test_an_override_that_cannot_be_used_is_refused(tmp_path: Path, override: str, parts: list[str]) -> None:
    path = written(tmp_path, GOOD + "recipes: [{kind: noise}]\n")
    message = refusal("config", "show", path, "--set", override)
    for part in parts:
        assert part in message


def test_a_missing_file_names_its_nearest_neighbour_or_the_bundled_ones(tmp_path: Path) -> None:
    written(tmp_path, GOOD, "mydigits.yaml")
    assert "did you mean 'mydigits.yaml'?" in refusal("train", str(tmp_path / "mydigit.yaml"), "--out", "x")
    assert "bundled configurations: " in refusal("demo", str(tmp_path / "nowhere" / "x.yaml"))


def test_a_folder_is_no_configuration(tmp_path: Path) -> None:
    assert "a folder, expected a YAML file" in refusal("invert", str(tmp_path))


def test_an_unset_environment_variable_in_a_path_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("NOT_SET_ANYWHERE", raising=False)
    path = written(tmp_path, GOOD + "cache: ${NOT_SET_ANYWHERE}/cache\n")
    message = refusal("config", "show", path)
    assert "NOT_SET_ANYWHERE is not set" in message and "cache" in message


def test_an_output_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    taken = tmp_path / "file"
    taken.write_text("mine")
    config = written(tmp_path, GOOD)
    assert "a file, expected a folder" in refusal("demo", config, "--out", str(taken))
    assert "cannot be written to" in refusal("train", config, "--out", "/proc/runs")
    assert "ends in .png" in refusal("preview", config, "--out", str(tmp_path / "preview.jpg"))
    assert taken.read_text() == "mine"


def test_options_that_exclude_each_other_are_refused() -> None:
    assert "--full and --smoke" in refusal("demo", "--full", "--smoke")


@pytest.mark.parametrize(
    "arguments",
    [["demo", "--shots", "0"], ["demo", "--nonsense"], ["trian", "x"], ["train"], ["preview", "--count"]],
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_the_real_command_prints_one_message_and_no_traceback(tmp_path: Path) -> None:
    path = written(tmp_path, "prior: {}\nloader: {ratio: 2}\n")
    done = subprocess.run([*CONSOLE, "demo", path], capture_output=True, text=True, cwd=tmp_path, timeout=30)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {path}: loader.ratio: input should be less than 1, got 2\n"


def test_the_real_command_refuses_in_the_same_words_without_a_terminal(tmp_path: Path) -> None:
    done = subprocess.run(
        [*CONSOLE, "train", "nothing.yaml", "--out", "runs"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "TERM": "dumb", "PYTHONIOENCODING": "ascii", "COLUMNS": "3"},
        timeout=30,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: nothing.yaml: no such file")
    assert not (tmp_path / "runs").exists()


# What only shows once data, model, bank and judge are looked at.


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of four 8x8 PNGs each."""
    root = tmp_path / "images"
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for index in range(4):
            pixels = random.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


def model_folder(path: Path, *, size: int = 8, channels: int = 1, classes: int | None = None) -> Path:
    """A diffusers folder as far as it is read before sampling: configurations and a file for the weights."""
    unet = {
        "_class_name": "UNet2DModel",
        "sample_size": size,
        "in_channels": channels,
        "out_channels": channels,
    }
    unet["num_class_embeds"] = classes
    contents = {
        "model_index.json": {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]},
        "unet/config.json": unet,
        "scheduler/scheduler_config.json": {"_class_name": "DDIMScheduler", "clip_sample": False},
    }
    for name, content in contents.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(json.dumps(content))
    (path / "unet" / "diffusion_pytorch_model.safetensors").touch()
    return path


@pytest.fixture
def settings(tmp_path: Path, images: Path) -> list[str]:
    """A configuration that is good as it stands, on the command line."""
    text = (
        f"cache: {tmp_path / 'cache'}\nmodel: {{path: {model_folder(tmp_path / 'model')}, steps: 4}}\n"
        f"data: {{source: folder, root: {images}, holdout: 2, validation: 0, max_bad: 2}}\n"
        "judge: {enabled: false}\nstream: {backend: process, batch_size: 4}\n"
    )
    return [written(tmp_path, text)]


def test_the_configuration_of_these_tests_is_good(settings: list[str]) -> None:
    result = CliRunner().invoke(app, ["invert", *settings])
    assert result.exit_code == 0, result.output
    assert "(6 images)" in result.stdout


def test_an_image_folder_that_cannot_be_used_is_refused(settings: list[str], tmp_path: Path, images: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no such folder" in refusal("invert", *settings, "--set", f"data.root={tmp_path / 'imagse'}")
    assert "is empty" in refusal("invert", *settings, "--set", f"data.root={tmp_path / 'empty'}")
    (images / "bird").mkdir()
    assert "'bird' has no image" in refusal("invert", *settings)


def test_more_unreadable_images_than_allowed_are_listed(settings: list[str], images: Path) -> None:
    for index in range(2):
        (images / "cat" / f"{index}.png").write_bytes(b"\x89PNG not really")
    assert CliRunner().invoke(app, ["invert", *settings]).exit_code == 0
    whole = (images / "dog" / "0.png").read_bytes()
    (images / "dog" / "0.png").write_bytes(whole[:40])
    message = refusal("invert", *settings)
    for name in ("cat/0.png", "cat/1.png", "dog/0.png", "max_bad"):
        assert name in message


def test_a_class_with_too_few_images_is_named(settings: list[str]) -> None:
    message = refusal("invert", *settings, "--set", "data.shots=50")
    assert "'cat'" in message and "50" in message


def test_a_folder_without_a_diffusers_model_is_refused(settings: list[str], tmp_path: Path) -> None:
    other, out = tmp_path / "other", str(tmp_path / "runs")
    other.mkdir()
    assert "no model_index.json" in refusal("train", *settings, "--out", out, "--set", f"model.path={other}")
    assert "no such folder" in refusal("invert", *settings, "--set", f"model.path={tmp_path / 'none'}")


def test_a_model_of_other_images_than_the_data_is_refused(settings: list[str], tmp_path: Path) -> None:
    larger = model_folder(tmp_path / "larger", size=16, channels=3)
    message = refusal("invert", *settings, "--set", f"model.path={larger}")
    assert "3 channels, 16x16" in message and "1 channel, 8x8" in message and "data.image_size" in message


def test_a_model_of_fewer_classes_than_the_data_is_refused(settings: list[str], tmp_path: Path) -> None:
    one = model_folder(tmp_path / "one", classes=1)
    assert "1 classes, the data have 2" in refusal("invert", *settings, "--set", f"model.path={one}")


def test_weights_that_are_not_numbers_are_refused(settings: list[str], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from streamaug.training.classifiers import build_classifier

    weights = build_classifier("small_cnn", channels=1, image_size=8, num_classes=2).state_dict()
    next(iter(weights.values()))[:] = float("nan")
    save_file(weights, tmp_path / "judge.safetensors")
    given = ["--set", "judge.enabled=true", "--set", f"judge.weights={tmp_path / 'judge.safetensors'}"]
    assert "NaN or infinity" in refusal("invert", *settings, *given)
    (tmp_path / "judge.safetensors").write_bytes(b"not weights")
    assert "cannot be read as safetensors" in refusal("invert", *settings, *given)


def test_a_cache_that_cannot_be_written_is_refused_before_training(settings: list[str]) -> None:
    given = ["--set", "model.path=null", "--set", "prior={steps: 1}", "--set", "cache=/proc/cache"]
    message = refusal("invert", *settings, *given)
    assert "/proc/cache cannot be written" in message and "STREAMAUG_CACHE" in message


def test_a_ring_that_does_not_fit_says_how_much_and_what_helps(settings: list[str], tmp_path: Path) -> None:
    given = ["--set", "stream.memory=shm", "--set", "stream.batch_size=2000000000"]
    message = refusal("train", *settings, *given, "--out", str(tmp_path / "runs"))
    assert "the ring needs" in message and "/dev/shm" in message and "--shm-size" in message
    assert not (tmp_path / "runs" / "report.json").exists()

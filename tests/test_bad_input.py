"""Bad input: one clear message on stderr, no traceback, exit code 2, and nothing lost."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from streamaug.cli import app
from streamaug.config import load
from streamaug.errors import ConfigError, MemoryTooSmall, ModelError, StreamaugError

GOOD = "prior: {}\n"
CONSOLE = [sys.executable, "-c", "from streamaug.cli import main; main()"]


def refusal(*arguments: str, env: dict[str, str] | None = None, code: int = 2) -> str:
    """The one message with which a command refuses."""
    result = CliRunner().invoke(app, list(arguments), env=env)
    assert result.exit_code == code, f"{result.exit_code}: {result.output}\n{result.exception!r}"
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
        ("seed: !ENV name\n", ["no Python tags", "!ENV"]),
        ("loader:\n  ratio: 0.5\n  ratio: 0.9\n", ["line 3", "'ratio' is given twice"]),
        ("seed: 2024-13-45\n", ["not YAML", "month"]),
        ("[" * 20000, ["nested too deeply"]),
        ("? [a]\n: 1\n", ["unhashable key", "line 1"]),
        ("prior: {}\ntrain: {lr: .inf}\n", ["train.lr", "finite", "inf"]),
        ("prior: {}\nloader: {ratio: .nan}\n", ["loader.ratio", "nan"]),
        ("prior: {}\nseed: -1\n", ["seed", "greater than or equal to 0"]),
        ("prior: {}\ncache:\n", ["cache: expected a path, got None"]),
        ("prior: {}\ncache: ''\n", ["cache: expected a path, got ''"]),
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
        ("seed=[1", ["not YAML"]),
        ("seed=!!python/name:os.system", ["no Python tags"]),
        ("recipes.9.weight=1", ["no index"]),
    ],
)
def test_an_override_that_cannot_be_used_is_refused(tmp_path: Path, override: str, parts: list[str]) -> None:
    path = written(tmp_path, GOOD + "recipes: [{kind: noise}]\n")
    message = refusal("config", "show", path, "--set", override)
    for part in parts:
        assert part in message


def test_an_empty_environment_variable_means_the_default(monkeypatch) -> None:
    monkeypatch.setenv("STREAMAUG_CACHE", "")
    assert load("digits").cache == Path.home() / ".cache" / "streamaug"


def test_a_missing_file_names_its_nearest_neighbour_or_the_bundled_ones(tmp_path: Path) -> None:
    written(tmp_path, GOOD, "mydigits.yaml")
    assert "did you mean 'mydigits.yaml'?" in refusal("train", str(tmp_path / "mydigit.yaml"), "--out", "x")
    assert "did you mean 'digits'?" in refusal("train", "digit", "--out", "x")
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
    (tmp_path / "folder.png").mkdir()
    assert "a folder" in refusal("preview", config, "--out", str(tmp_path / "folder.png"))
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
    done = subprocess.run([*CONSOLE, "demo", path], capture_output=True, text=True, cwd=tmp_path, timeout=120)
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
        timeout=120,
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
    tolerated = CliRunner().invoke(app, ["invert", *settings])
    assert tolerated.exit_code == 0
    for name in ("cat/0.png", "cat/1.png"):
        assert f"{name}: " in tolerated.stderr
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


@pytest.mark.parametrize(
    ("file", "content", "parts"),
    [
        ("model_index.json", "[]", ["model_index.json", "JSON object"]),
        ("unet/config.json", "[]", ["unet/config.json", "JSON object"]),
        ("unet/config.json", "{", ["unet/config.json", "cannot be read"]),
        ("unet/config.json", "{}", ["sample_size None"]),
        ("unet/config.json", '{"sample_size": "8"}', ["sample_size '8'"]),
        ("unet/config.json", '{"sample_size": 8, "in_channels": 1, "out_channels": 3}', ["takes 1", "predicts 3"]),
        ("scheduler/scheduler_config.json", "[]", ["scheduler_config.json", "JSON object"]),
        ("scheduler/scheduler_config.json", '{"_class_name": "DDIMSheduler"}', ["did you mean 'DDIMScheduler'?"]),
        ("scheduler/scheduler_config.json", '{"_class_name": "UNet2DModel"}', ["'UNet2DModel' is not one"]),
    ],
)
def test_a_damaged_model_folder_is_refused_before_anything_is_inverted(
    settings: list[str], tmp_path: Path, file: str, content: str, parts: list[str]
) -> None:
    damaged = model_folder(tmp_path / "damaged")
    (damaged / file).write_text(content)
    message = refusal("invert", *settings, "--set", f"model.path={damaged}")
    for part in [*parts, str(damaged)]:
        assert part in message
    assert not (tmp_path / "cache").exists()


def test_weights_of_a_model_that_are_broken_or_not_all_there_are_refused(tmp_path: Path) -> None:
    import torch
    from diffusers import UNet2DModel
    from safetensors.torch import load_file, save_file

    from streamaug.sampling.denoisers import LoadSettings, inspect, load

    folder = model_folder(tmp_path / "model")
    blocks = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "block_out_channels": [8]}
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        norm_num_groups=4,
        add_attention=False,
        **blocks,
    )
    unet.save_pretrained(folder / "unet")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    good = load_file(file)

    def loading() -> str:
        with pytest.raises(ModelError) as error:
            load(inspect(folder), LoadSettings(torch.device("cpu")))
        return str(error.value)

    save_file({name: value for name, value in good.items() if name != "conv_in.bias"}, file)
    assert "1 tensors that unet/config.json asks for" in loading() and "conv_in.bias" in loading()
    save_file({**good, "conv_in.bias": torch.full_like(good["conv_in.bias"], float("nan"))}, file)
    assert "NaN or infinity, first in conv_in.bias" in loading()
    file.write_bytes(file.read_bytes()[:200])
    assert "cannot be loaded (truncated" in loading()


def test_a_device_that_is_not_there_is_refused_before_any_work(settings: list[str], monkeypatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = refusal("invert", *settings, "--set", "model.device=cuda")
    assert "'cuda'" in message and "no usable GPU" in message and "accepted on this machine: auto, cpu" in message
    assert "'gpu'" in refusal("invert", *settings, "--set", "model.device=gpu")


def test_an_unknown_classifier_is_refused_before_any_work(settings: list[str], tmp_path: Path) -> None:
    for section in ("train", "judge"):
        out = ["--out", str(tmp_path / "preview.png")]
        message = refusal("preview", *settings, *out, "--set", f"{section}.classifier=smal_cnn")
        assert "did you mean 'small_cnn'?" in message
    assert not (tmp_path / "cache").exists()


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
    given += ["--out", str(tmp_path / "preview.png")]
    assert "NaN or infinity" in refusal("preview", *settings, *given)
    (tmp_path / "judge.safetensors").write_bytes(b"not weights")
    assert "cannot be read as safetensors" in refusal("preview", *settings, *given)


def test_a_cache_that_cannot_be_written_is_refused_before_training(settings: list[str]) -> None:
    given = ["--set", "model.path=null", "--set", "prior={steps: 1}", "--set", "cache=/proc/cache"]
    message = refusal("invert", *settings, *given)
    assert "/proc/cache cannot be written" in message and "STREAMAUG_CACHE" in message


def test_a_read_only_cache_that_has_everything_is_enough(settings: list[str], monkeypatch) -> None:
    from streamaug import generator, inverting

    assert CliRunner().invoke(app, ["invert", *settings]).exit_code == 0

    def refuse(cache: Path) -> None:
        raise ConfigError("read-only")

    for module in (generator, inverting):
        monkeypatch.setattr(module, "check_writable", refuse)
    assert CliRunner().invoke(app, ["invert", *settings]).exit_code == 0
    assert "read-only" in refusal("invert", *settings, "--set", "data.shots=1")


def test_a_bank_path_that_is_a_file_is_refused(settings: list[str], tmp_path: Path) -> None:
    (tmp_path / "bank").write_text("mine")
    assert "a file; a latent bank is a folder" in refusal("invert", *settings, "--out", str(tmp_path / "bank"))
    assert (tmp_path / "bank").read_text() == "mine"


@contextlib.contextmanager
def files_limited_to(nbytes: int) -> Iterator[None]:
    """Files of this process cannot grow beyond `nbytes`, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_full_disk_leaves_the_bank_that_is_there(settings: list[str], tmp_path: Path) -> None:
    bank = tmp_path / "bank"
    given = [*settings, "--out", str(bank)]
    assert CliRunner().invoke(app, ["invert", *given]).exit_code == 0
    before = contents(bank)
    with files_limited_to(100):
        message = refusal("invert", *given, "--set", "data.shots=1", code=1)
    assert "cannot be written" in message and "make room and start again" in message
    assert before.items() <= contents(bank).items()
    assert CliRunner().invoke(app, ["invert", *given]).exit_code == 0


def test_a_full_disk_leaves_the_prior_that_is_there(tmp_path: Path) -> None:
    from streamaug.prior import save_atomically

    class Pipeline:
        def save_pretrained(self, path: Path, safe_serialization: bool) -> None:
            (path / "weights").write_bytes(bytes(1000))

    prior = tmp_path / "prior"
    save_atomically(Pipeline(), prior)
    before = contents(tmp_path)
    with files_limited_to(100), pytest.raises(ModelError, match=r"cannot be written.*free some space"):
        save_atomically(Pipeline(), prior)
    assert contents(tmp_path) == before
    assert os.listdir(tmp_path) == ["prior"]


def test_an_interrupt_between_the_old_prior_and_the_new_one_keeps_the_old(tmp_path: Path, monkeypatch) -> None:
    from streamaug import prior

    class Pipeline:
        def save_pretrained(self, path: Path, safe_serialization: bool) -> None:
            (path / "weights").write_text("x")

    prior.save_atomically(Pipeline(), tmp_path / "prior")
    moves = []

    def replace(source: Path, target: Path) -> None:
        moves.append(source)
        if len(moves) == 2:
            raise KeyboardInterrupt
        os.rename(source, target)

    monkeypatch.setattr(prior.os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        prior.save_atomically(Pipeline(), tmp_path / "prior")
    assert os.listdir(tmp_path) == ["prior"] and (tmp_path / "prior" / "weights").is_file()


def test_an_output_file_that_cannot_be_written_is_named_and_the_old_one_stays(tmp_path: Path) -> None:
    from streamaug.outputs import write_whole

    file = tmp_path / "report.json"
    write_whole(file, b"old")
    with files_limited_to(100), pytest.raises(StreamaugError) as error:
        write_whole(file, bytes(2000))
    assert str(error.value).startswith(f"{file}: cannot be written: ") and "2 kB needed" in str(error.value)
    assert error.value.exit_code == 1
    assert contents(tmp_path) == {"report.json": b"old"}


def test_a_machine_without_dev_shm_says_so(monkeypatch, tmp_path: Path) -> None:
    from streamaug.stream.ring import memory

    monkeypatch.setattr(memory, "SHM_FOLDER", str(tmp_path / "shm"))
    with pytest.raises(MemoryTooSmall, match=r"which does not exist.*stream.memory: memfd"):
        memory.require("shm", 1000, "a ring")
    memory.require(memory.choose("auto"), 1000, "a ring")


def test_a_ring_that_does_not_fit_says_how_much_and_what_helps(settings: list[str], tmp_path: Path) -> None:
    given = ["--set", "stream.memory=shm", "--set", "stream.batch_size=2000000000", "--set", "model.compile=false"]
    message = refusal("train", *settings, *given, "--out", str(tmp_path / "runs"))
    assert "the ring needs" in message and "/dev/shm" in message and "--shm-size" in message
    assert not (tmp_path / "runs" / "report.json").exists()

"""Preparation: reuse what is current, refuse what does not fit, from the real digits configuration."""

import json
import os
import random
import shutil
import time

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from safetensors.torch import load_file, save_file

from streamaug.config import load
from streamaug.errors import BankError, ConfigError, MismatchError, ModelError, UsageError
from streamaug.filtering.judge import pack_state
from streamaug.preparation import prepare
from streamaug.progress import Logged
from streamaug.sampling import denoisers
from streamaug.sampling.denoisers import LoadSettings, inspect
from streamaug.stream import Stream


class Phases:
    def __init__(self):
        self.names = []

    def phase(self, name, total=None):
        self.names.append(name)

    def advance(self, n=1, **figures):
        pass


@pytest.fixture(scope="module")
def prepared(small_overrides):
    return prepare(load("digits", small_overrides))


def test_the_bank_holds_exactly_the_labelled_images(prepared):
    assert prepared.bank.num_rows == 30
    assert np.bincount(prepared.bank.labels).tolist() == [3] * 10
    pixels = ((prepared.bank.tensor("latent").float() + 1) * 127.5).round().byte().numpy()
    np.testing.assert_array_equal(pixels, prepared.labelled.images)
    test = set(prepared.splits.test.hashes)
    assert not test & set(prepared.labelled.hashes)
    assert not test & set(prepared.splits.unlabelled.hashes)


def test_a_second_call_trains_and_writes_nothing(prepared, small_overrides, cache):
    def written():
        return {str(file): file.stat().st_mtime_ns for file in cache.rglob("*") if file.is_file()}

    before, phases = written(), Phases()
    again = prepare(load("digits", small_overrides), progress=phases)
    assert "training the prior" not in phases.names
    assert written() == before
    assert np.array_equal(again.judge_state, prepared.judge_state)
    assert again.planner.digest() == prepared.planner.digest()


def test_the_changed_line_leaves_every_global_random_state_as_it_was(prepared, small_overrides):
    def draws():
        return torch.rand(4).tolist(), np.random.rand(4).tolist(), [random.random() for _ in range(4)]

    def seed():
        torch.manual_seed(3)
        np.random.seed(3)
        random.seed(3)

    seed()
    expected = draws()
    seed()
    with Stream.from_config("digits", small_overrides) as stream:
        assert draws() == expected
        assert repr(stream) == "<Stream of 10 classes, images 1x8x8, rank 0 of 1: not started>"
    assert repr(stream).endswith(": closed>")


def test_a_script_is_told_how_long_preparing_takes_and_where_it_is_kept(monkeypatch, caplog):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    progress = Logged(" (kept in /cache)")
    progress.phase("loading images")
    progress.advance()
    progress.phase("training the prior", 3000)
    for now in range(1, 31):  # noqa: B007
        progress.advance(100)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        (
            "WARNING",
            "preparing the stream: training the prior: 500/3,000 (17%), 25 s left (kept in /cache)",
        ),
        ("WARNING", "preparing the stream: training the prior: 2,000/3,000 (67%), 10 s left"),
    ]


def test_another_seed_draws_other_images_and_other_orders(prepared, small_overrides):
    other = prepare(load("digits", [*small_overrides, "seed=1"]))
    assert set(other.labelled.hashes) != set(prepared.labelled.hashes)
    assert other.planner.digest() != prepared.planner.digest()
    assert other.model.digest == prepared.model.digest


def test_an_unwritable_cache_is_one_message(small_overrides, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        prepare(load("digits", [*small_overrides, f"cache={tmp_path / 'file' / 'cache'}"]))


@pytest.fixture
def model_copy(prepared, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(prepared.model.path, path)
    return path


def refused(kind, small_overrides, *overrides):
    with pytest.raises(kind) as caught:
        prepare(load("digits", [*small_overrides, *overrides]))
    assert isinstance(caught.value, UsageError)
    return str(caught.value)


def test_what_is_no_model_folder_is_refused(small_overrides, tmp_path, model_copy):
    assert "no such folder" in refused(ModelError, small_overrides, f"model.path={tmp_path / 'none'}")
    (tmp_path / "empty").mkdir()
    assert "not a diffusers model folder" in refused(ModelError, small_overrides, f"model.path={tmp_path / 'empty'}")
    (model_copy / "unet" / "diffusion_pytorch_model.safetensors").rename(model_copy / "unet" / "weights.bin")
    assert "safetensors only" in refused(ModelError, small_overrides, f"model.path={model_copy}")
    (model_copy / "model_index.json").write_text("{broken")
    assert "cannot be read" in refused(ModelError, small_overrides, f"model.path={model_copy}")


def test_an_unsupported_family_names_the_supported_ones(small_overrides, model_copy):
    index = json.loads((model_copy / "model_index.json").read_text())
    index["_class_name"] = "AudioLDMPipeline"
    (model_copy / "model_index.json").write_text(json.dumps(index))
    assert "supported: DDPMPipeline, DDIMPipeline" in refused(ModelError, small_overrides, f"model.path={model_copy}")


def test_weights_with_nan_name_the_tensor(model_copy):
    file = model_copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_in.weight"][0, 0, 0, 0] = float("nan")
    save_file(weights, file)
    with pytest.raises(ModelError, match=r"conv_in\.weight"):
        denoisers.load(inspect(model_copy), LoadSettings(torch.device("cpu")))


def test_a_truncated_weight_file_is_one_message(model_copy):
    file = model_copy / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        denoisers.load(inspect(model_copy), LoadSettings(torch.device("cpu")))


def test_a_model_of_another_size_names_the_setting(small_overrides, model_copy):
    message = refused(MismatchError, small_overrides, f"model.path={model_copy}", "data.image_size=16")
    assert "1 channel, 8x8 pixels" in message
    assert "16x16" in message
    assert "data.image_size to 8" in message


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["recipes=[{kind: prompt}]"], "recipes.0: kind 'prompt' needs"),
        (["recipes.0.guidance=[2, 3]"], "recipes.0.guidance"),
        (["recipes.0.classifier_guidance=[1, 2]", "judge.enabled=false"], "needs the judge"),
        (["model.null_class=3"], "model.null_class is 3"),
        (["model.steps=1001"], "model.steps: input should be less than or equal to 1000"),
    ],
)
def test_recipes_the_model_cannot_serve_are_refused(small_overrides, overrides, part):
    assert part in refused(UsageError, small_overrides, *overrides)


def test_a_judge_from_a_file_is_used_and_checked(prepared, small_overrides, tmp_path):
    file = tmp_path / "judge.safetensors"
    weights = {name: value.clone() for name, value in prepared.judge.classifier.classifier.state_dict().items()}
    save_file(weights, file)
    loaded = prepare(load("digits", [*small_overrides, f"judge.weights={file}"]))
    assert np.array_equal(pack_state(loaded.judge), prepared.judge_state)
    weights["head.2.bias"] = torch.zeros(3)
    save_file(weights, file)
    assert "do not fit classifier" in refused(ModelError, small_overrides, f"judge.weights={file}")
    weights["head.2.bias"] = torch.full((10,), float("nan"))
    save_file(weights, file)
    assert "NaN" in refused(ModelError, small_overrides, f"judge.weights={file}")
    file.write_bytes(b"PK\x03\x04 pickled")
    assert "safetensors" in refused(ModelError, small_overrides, f"judge.weights={file}")


def test_a_path_that_holds_something_else_is_not_overwritten(small_overrides, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    refused(BankError, small_overrides, f"bank.path={tmp_path}")
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_a_class_conditional_model_must_know_the_classes(small_overrides, tmp_path):
    from streamaug.config import PriorConfig
    from streamaug.prior import build_unet

    base = build_unet((1, 8, 8), PriorConfig(channels=[8, 16]))
    unet = type(base)(**{**base.config, "num_class_embeds": 7})
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path / "model")
    assert "knows 7 classes, the data have 10" in refused(
        MismatchError, small_overrides, f"model.path={tmp_path / 'model'}"
    )

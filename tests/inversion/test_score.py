"""The judge's scores of what rows give back: a part of its own, which another judge redoes alone."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sampling.denoisers.tiny import stable_diffusion, unet2d
from torch import nn

from streamaug.bank import Checkpoint, LatentBank
from streamaug.config import Config, JudgeConfig
from streamaug.data import ImageSet
from streamaug.errors import ConfigError
from streamaug.filtering.judge import Judge
from streamaug.inversion.encode import Codec, Encode
from streamaug.inversion.methods import methods_for
from streamaug.inversion.run import invert
from streamaug.inversion.score import Score
from streamaug.sampling.denoisers import ModelInfo, inspect

CPU = torch.device("cpu")


class ByBrightness(nn.Module):
    """Class 1 for bright images, 0 for dark ones."""

    def __init__(self, sharpness: float):
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor(sharpness))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        brightness = (images.mean((1, 2, 3)) - 0.5) * self.sharpness
        return torch.stack([-brightness, brightness], 1)


def judge(sharpness: float = 10.0) -> Judge:
    return Judge(ByBrightness(sharpness), 2, JudgeConfig())


def images(size: int = 8) -> ImageSet:
    pixels = np.full((4, 3, size, size), 40, dtype=np.uint8)
    pixels[2:] = 220
    return ImageSet.from_arrays(pixels, [0, 1, 0, 1], ["dark", "bright"])


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> ModelInfo:
    folder = tmp_path_factory.mktemp("model")
    unet2d.build(folder)
    return inspect(folder)


def settings(info: ModelInfo, **bank) -> Config:
    return Config.model_validate({"model": {"path": str(info.path), "device": "cpu"}, "bank": {"score": True} | bank})


def write(path: Path, info: ModelInfo, by: Judge | None) -> LatentBank:
    methods = methods_for(settings(info), info, None, by)
    return invert(images(), path, methods, model_digest=info.digest, shard_rows=64)


def test_a_score_is_the_probability_of_the_label(tmp_path, model):
    bank = write(tmp_path / "bank", model, judge())
    right = float(torch.sigmoid(torch.tensor(20 * (220 / 255 - 0.5))))
    wrong = float(torch.sigmoid(torch.tensor(20 * (40 / 255 - 0.5))))
    np.testing.assert_allclose(bank.row_array("encode.score"), [1 - wrong, wrong, 1 - right, right], atol=1e-3)
    assert bank.tensor_names == ["latent"]


def test_another_judge_redoes_the_scores_alone(tmp_path, model, monkeypatch):
    calls: list[str] = []
    for method in (Encode, Score):
        compute = method.compute
        monkeypatch.setattr(
            method, "compute", lambda self, *given, run=compute: calls.append(self.part.name) or run(self, *given)
        )
    first = write(tmp_path / "bank", model, judge())
    assert calls == ["encode", "score"]
    second = write(tmp_path / "bank", model, judge(1.0))
    assert calls == ["encode", "score", "score"]
    assert not np.allclose(first.row_array("encode.score"), second.row_array("encode.score"))
    write(tmp_path / "bank", model, judge(1.0))
    assert len(calls) == 3


def test_the_judge_sees_what_the_autoencoder_gives_back(tmp_path):
    stable_diffusion.build(tmp_path / "model")
    info = inspect(tmp_path / "model", 32)
    codec, real = Codec(info, CPU), images(32)
    made = Score(info, "float32", codec, judge())
    found = made.compute(real.images, real.labels, np.arange(4), Checkpoint(None))["encode.score"]
    back = codec.decode(codec.encode(real.images))
    torch.testing.assert_close(found, judge().score(back, torch.from_numpy(real.labels))[0])


def test_rows_are_scored_only_where_there_is_a_judge_and_it_is_asked_for(model):
    def names(config: Config, by: Judge | None) -> list[str]:
        return [method.part.name for method in methods_for(config, model, None, by)]

    assert names(settings(model), judge()) == ["encode", "score"]
    assert names(settings(model), None) == ["encode"]
    assert names(settings(model, score=False), judge()) == ["encode"]
    assert names(settings(model, methods=["ddim", "encode"]), judge()) == ["ddim", "encode", "score"]
    assert names(settings(model, methods=["prompt"]), judge()) == []


def test_a_method_that_does_not_fit_the_model_is_refused(model):
    with pytest.raises(ConfigError, match=r"bank\.methods: 'embedding' .* is told nothing"):
        methods_for(settings(model, methods=["embedding"]), model, None)


def test_no_weights_are_read_for_a_bank_that_is_complete(tmp_path, model, monkeypatch):
    config = settings(model, methods=["encode", "ddim"], score=False)
    config = config.model_copy(update={"model": config.model.model_copy(update={"steps": 3})})
    arguments = {"model_digest": model.digest, "shard_rows": 64}
    first = invert(images(), tmp_path / "bank", methods_for(config, model, None), **arguments)
    monkeypatch.setattr("streamaug.sampling.denoisers.load", lambda *given: pytest.fail("weights were read"))
    again = invert(images(), tmp_path / "bank", methods_for(config, model, None), **arguments)
    assert again.digest == first.digest

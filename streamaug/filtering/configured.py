"""The judge that a configuration asks for: fitted on the labelled images, or with the user's weights."""

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from streamaug.config import Config
from streamaug.data import ImageSet
from streamaug.engine import resolve_device
from streamaug.errors import ConfigError, ModelError
from streamaug.filtering.calibration import build_judge, calibrate, fit_judge, fit_probe
from streamaug.filtering.features import Features, Probed
from streamaug.filtering.judge import Judge
from streamaug.sampling.denoisers import FAMILIES, LoadSettings, ModelInfo, load


def judge_features(config: Config, model: ModelInfo) -> Features | None:
    """The denoiser's features, when `judge.features` asks for them. Raises ConfigError for a family without."""
    if not config.judge.features:
        return None
    if not hasattr(FAMILIES[model.family], "FEATURES"):
        having = [name for name, family in FAMILIES.items() if hasattr(family, "FEATURES")]
        raise ConfigError(f"judge.features: {model.family} gives none; accepted are models of: {', '.join(having)}")
    settings = LoadSettings(resolve_device(config.model.device), variant=config.model.variant)
    return Features(load(model, settings), config.judge.feature_timestep)


def make_judge(config: Config, labelled: ImageSet, seed: int, features: Features | None = None) -> Judge:
    """The judge with the user's weights, or fitted on the labelled images."""
    if config.judge.weights is None:
        return fit_judge(config, labelled, seed, features)
    judge = build_judge(config, len(labelled.class_names), features)
    pixels = Probed.pixels(judge.classifier)
    path = config.judge.weights
    try:
        pixels.load_state_dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise ModelError(f"judge.weights {path}: cannot be read as safetensors: {error}") from None
    except RuntimeError as error:
        raise ModelError(f"judge.weights {path}: do not fit classifier '{config.judge.classifier}': {error}") from None
    broken = [name for name, value in judge.state_dict().items() if not torch.isfinite(value.float()).all()]
    if broken:
        raise ModelError(f"judge.weights {path}: NaN or infinity in {', '.join(broken)}")
    fit_probe(config, judge, labelled, seed)
    calibrate(judge, labelled, config)
    return judge

"""The inversion methods that a configuration asks for, made for its model, or why they do not fit it."""

from pathlib import Path

from streamaug.config import Config
from streamaug.engine import resolve_device
from streamaug.filtering.judge import Judge
from streamaug.inversion.ddim import Ddim
from streamaug.inversion.embedding import Embedding
from streamaug.inversion.encode import Codec, Encode
from streamaug.inversion.method import Method
from streamaug.inversion.score import Score
from streamaug.sampling.denoisers import ModelInfo


def methods_for(config: Config, model: ModelInfo, prompts: Path | None, judge: Judge | None = None) -> list[Method]:
    """The methods of `bank.methods`, in that order; "prompt" stores nothing, so it gives none. No weights are read.

    prompts: the file of encoded prompts, for models that take them; judge: scores the rows when `bank.score` asks for
    it; without one they are not scored. Raises ConfigError for a method or setting that does not fit the model, and
    ModelError for a model or scheduler that cannot be inverted.
    """
    codec = Codec(model, resolve_device(config.model.device), config.model.variant)
    methods: list[Method] = []
    for name in config.bank.methods:
        if name == "encode":
            methods.append(Encode(model, config.bank, codec))
        elif name == "ddim":
            methods.append(Ddim(model, config, prompts, codec))
        elif name == "embedding":
            methods.append(Embedding(model, config, prompts, codec))
    if methods and config.bank.score and judge is not None:
        methods.append(Score(model, config.bank.dtype, codec, judge))
    return methods

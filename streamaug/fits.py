"""Whether model, bank methods, recipes and images fit together: refused here, before anything is computed."""

from collections.abc import Sequence

from streamaug.config import BankConfig, Config, Recipe
from streamaug.data import ImageSet
from streamaug.errors import ConfigError, MismatchError
from streamaug.orders import served_classes
from streamaug.sampling.denoisers import ModelInfo


def check_recipes(config: Config, class_names: Sequence[str]) -> None:
    """Refuse a recipe whose bank rows no method writes, or whose classes the data have not.

    Raises ConfigError, and DataError for an unknown class and for one that no recipe is for.
    """
    served_classes([recipe for recipe in config.recipes if recipe.weight > 0], len(class_names), class_names)
    untold = None
    if config.model.path is None and config.prior is not None and not config.prior.labels:
        untold = (
            "needs a generator that is told the class, and the prior is trained without labels: set prior.labels to "
            "true (those that data.shots leaves) or to all, or model.path to a model that takes a class or a prompt"
        )
        if "embedding" in config.bank.methods:
            raise ConfigError(f"bank.methods: 'embedding' {untold}")
    for position, recipe in enumerate(config.recipes):
        if recipe.pairs == "mixed" and len(recipe.classes or class_names) < 2:
            raise ConfigError(
                f"recipes.{position}: pairs 'mixed' takes partners of the recipe's other classes and it has one class, "
                f"{', '.join(recipe.classes or class_names)}: name more, or set pairs to same or nearest"
            )
        if recipe.kind == "prompt" and untold and not recipe.classifier_guidance[0]:
            raise ConfigError(f"recipes.{position}: kind 'prompt' {untold}, or classifier_guidance above 0")
        missing = _missing_method(recipe, config.bank)
        if missing:
            what = {"encode": "the images' latents", "ddim": "inverted latents", "embedding": "inverted embeddings"}
            raise ConfigError(
                f"recipes.{position}: kind '{recipe.kind}' takes {what[missing]}, which bank.methods "
                f"[{', '.join(config.bank.methods)}] does not write: add {missing}"
            )


def _missing_method(recipe: Recipe, bank: BankConfig) -> str | None:
    by_rows = {"latent": "encode", "inverted": "ddim", None: None}[recipe.rows]
    wanted = [by_rows, "embedding" if recipe.by_embedding else None]
    return next((method for method in wanted if method and method not in bank.methods), None)


def check_without_images(config: Config) -> None:
    """Refuse what needs images when there are only class names. Raises ConfigError."""
    if config.model.path is None:
        raise ConfigError("without images there is nothing to train a prior on: set model.path to a diffusers folder")
    if config.bank.methods != ["prompt"] or any(recipe.kind != "prompt" for recipe in config.recipes):
        raise ConfigError(
            "without images there is nothing to invert: set bank.methods to [prompt] and use recipes of kind prompt"
        )
    if config.judge.enabled and (
        config.judge.weights is None or config.judge.features or config.judge.rule == "calibrated"
    ):
        raise ConfigError(
            "without images no judge can be fitted: set judge.enabled to false, or judge.weights to a trained "
            "classifier, with judge.rule fixed and judge.features false"
        )


def check_model(config: Config, model: ModelInfo, labelled: ImageSet) -> None:
    """Refuse a model that does not fit the images or the recipes."""
    if model.image_shape != labelled.image_shape:
        channels, size, _ = model.image_shape
        raise MismatchError(
            f"{model.path} makes images of {_shape(model.image_shape)}, the data are {_shape(labelled.image_shape)}: "
            f"set data.channels to {channels} and data.image_size to {size}"
        )
    classes = len(labelled.class_names)
    if 0 < model.num_classes < classes:
        raise MismatchError(
            f"{model.path} knows {model.num_classes} classes, the data have {classes}: set model.path to a model "
            "of at least as many, or data.root to a folder of at most as many"
        )
    null_class = _null_class(config, model)
    if null_class is not None and not 0 <= null_class < model.num_classes:
        raise MismatchError(f"model.null_class is {null_class}, the model has classes 0 to {model.num_classes - 1}")
    if null_class is not None and null_class < classes and model.class_ids is None:
        raise MismatchError(
            f"the class {null_class} of {model.path} means 'no class' and is one of the data's {classes} classes: set "
            f"data.root to a folder of at most {null_class}, or model.null_class to the class that means none"
        )
    for position, recipe in enumerate(config.recipes):
        where = f"recipes.{position}"
        by_label = model.conditioning != "none" or recipe.classifier_guidance[0] > 0
        if recipe.kind == "prompt" and not by_label:
            raise ConfigError(
                f"{where}: 'prompt' needs a class-conditional model or classifier_guidance above 0; "
                "this model does not know labels, use 'noise' or 'interpolate'"
            )
        by_mean = recipe.by_embedding and model.guidance == "cfg"  # the group's mean embedding is the null condition
        if recipe.guidance != (1.0, 1.0) and not (guides(config, model) or by_mean):
            missing = "null class: set model.null_class"
            if model.guidance == "none":
                prompted = model.conditioning == "prompt"
                missing = "model that was not distilled to run without it" if prompted else "class-conditional model"
            raise ConfigError(f"{where}.guidance: classifier-free guidance needs a {missing}; or set it to [1, 1]")
        if recipe.classifier_guidance[1] > 0 and not config.judge.enabled:
            raise ConfigError(f"{where}.classifier_guidance needs the judge: set judge.enabled to true")


def guides(config: Config, model: ModelInfo) -> bool:
    """Whether the model can be guided away from "no class" or from the negative prompt."""
    if model.guidance == "cfg":
        return model.conditioning == "prompt" or _null_class(config, model) is not None
    return model.guidance == "embedded"


def _null_class(config: Config, model: ModelInfo) -> int | None:
    return model.null_class if config.model.null_class is None else config.model.null_class


def _shape(shape: tuple[int, int, int]) -> str:
    return f"{shape[0]} channel{'s' if shape[0] > 1 else ''}, {shape[1]}x{shape[2]} pixels"

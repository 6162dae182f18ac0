"""The YAML's schema and its loading: one file describes data, model, bank, recipes, judge, stream and training.

Everything downstream receives a validated `Config`; nothing else in the package parses YAML.
"""

import hashlib
import importlib.resources
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from streamaug.errors import ConfigError, nearest

_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def _expand_path(value: Any) -> Any:
    """Replace ${NAME}, ${NAME:-default} and ~ in a path; as in a shell, the default is also for an empty NAME."""
    if value is None or isinstance(value, Path):
        return value
    if not isinstance(value, str) or not value:
        raise ValueError(f"expected a path, got {value!r}")

    def substitute(match: re.Match[str]) -> str:
        name, default = match.group(1), match.group(2)
        found = os.environ.get(name) or default
        if found is None:
            raise ValueError(f"the environment variable {name} is not set (set it, or write ${{{name}:-a default}})")
        return found

    return os.path.expanduser(_VARIABLE.sub(substitute, value))


ConfigPath = Annotated[Path, BeforeValidator(_expand_path)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Range = tuple[float, float]
Seed = Annotated[int, Field(ge=0, lt=1 << 62)]
Overrides = Sequence[str] | Mapping[str, Any]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")

# Every named source, and what its `root` is; None where there is none.
SOURCES: dict[str, str | None] = {
    "digits": None,  # scikit-learn's handwritten digits
    "classes": None,  # no images, only class names: for models that know them
    "folder": "a folder with one folder of images per class",
    "idx": "a folder with train-images-idx3-ubyte, train-labels-idx1-ubyte and the same for t10k (MNIST's format)",
    "huggingface": "a folder written by datasets' save_to_disk",
    "webdataset": "a folder of .tar shards, or one shard",
}


class DataConfig(Section):
    """The labelled real images: where they come from and how they become [C, H, W] uint8."""

    source: str = "digits"  # one of SOURCES, or the import path of a data set class, "torchvision.datasets.CIFAR10"
    root: ConfigPath | None = None  # where the images are: what is expected there depends on the source
    test_root: ConfigPath | None = None  # sources with a root: held-out images, of the same classes
    options: dict[str, Any] = {}  # data set class: arguments of its constructor
    test_options: dict[str, Any] | None = None  # data set class: arguments that give the held-out images
    image_key: str | None = None  # huggingface, webdataset: where a sample keeps its image; null: found
    label_key: str | None = None  # huggingface, webdataset: where it keeps its label; null: found
    class_names: list[str] | None = None  # classes: their names; others: names where the data have only numbers
    image_size: Annotated[int, Field(ge=1)] = 8  # pixels a side, after `fit`
    channels: Literal[1, 3] = 1
    fit: Literal["crop", "letterbox", "stretch"] = "crop"
    shots: Annotated[int, Field(ge=1)] | None = None  # labelled images per class; null uses all of them
    holdout: Annotated[float, Field(ge=0.0)] = 500  # test images: a count, or a fraction when below 1
    validation: Annotated[float, Field(ge=0.0)] = 297  # tuning images, likewise, taken from the rest
    max_bad: Annotated[int, Field(ge=0)] = 10  # unreadable files tolerated before stopping

    @model_validator(mode="after")
    def _source_has_what_it_reads(self) -> "DataConfig":
        if self.source not in SOURCES and not _IMPORT_PATH.fullmatch(self.source):
            raise ValueError(
                f"source {self.source!r}{nearest(self.source, SOURCES)}; accepted: {', '.join(SOURCES)}, or the import "
                "path of a data set class such as torchvision.datasets.CIFAR10"
            )
        expected = SOURCES.get(self.source)
        if expected is not None and self.root is None:
            raise ValueError(f"source '{self.source}' needs root: {expected}")
        takers = {
            "test_root": [name for name, what in SOURCES.items() if what] + ["an import path"],
            "options": ["an import path"],
            "test_options": ["an import path"],
            "image_key": ["huggingface", "webdataset"],
            "label_key": ["huggingface", "webdataset"],
        }
        kind = self.source if self.source in SOURCES else "an import path"
        for key, sources in takers.items():
            if getattr(self, key) and kind not in sources:
                raise ValueError(f"source '{self.source}' does not use {key}; it belongs to: {', '.join(sources)}")
        if self.source == "classes" and not self.class_names:
            raise ValueError("source 'classes' needs class_names: the classes that the model is to make images of")
        return self


Wordings = Annotated[list[str], Field(min_length=1)]


class ModelConfig(Section):
    """The diffusion model: a diffusers folder, or null to train `prior` into the cache."""

    path: ConfigPath | None = None
    variant: str | None = None  # "fp16" reads diffusion_pytorch_model.fp16.safetensors
    scheduler: str = "keep"  # the model's own, an alias such as "ddim" or "dpmsolver++", or a diffusers class name
    scheduler_config: dict[str, Any] = {}  # overrides of the scheduler's configuration, such as use_karras_sigmas
    eta: Annotated[float, Field(ge=0, le=1)] | None = None  # noise of DDIM's and TCD's step; null: the pipeline's
    steps: Annotated[int, Field(ge=1, le=1000)] = 20
    null_class: int | None = None  # the label that means "no class", for classifier-free guidance
    # Wordings, of which each image gets one; {} is the class name. Or a list for each class by name, and "default".
    prompts: Wordings | Annotated[dict[str, Wordings], Field(min_length=1)] = ["a photo of a {}"]
    negative_prompt: str = ""  # the unconditional half of guidance
    class_tokens: list[ConfigPath] = []  # safetensors of textual-inversion embeddings, whose tokens prompts may use
    guidance_interval: tuple[Fraction, Fraction] = (0.0, 1.0)  # share of the schedule in which guidance acts
    guidance_rescale: Fraction = 0.0  # draws the guided output's contrast towards the conditional one's
    embedded_guidance: Annotated[float, Field(ge=0)] | None = None  # what models that take a scale as an input are
    # told; recipes' guidance then leads away from negative_prompt, at twice the cost (Flux's "true CFG")
    original_size: Annotated[int, Field(ge=1)] | None = None  # SDXL: pixels a side its images are asked to have had;
    target_size: Annotated[int, Field(ge=1)] | None = None  # and to be cropped to; null: its own, or image_size if more
    tiny_vae: ConfigPath | None = None  # folder of an AutoencoderTiny that decodes instead of the model's own
    upscaler: ConfigPath | None = None  # folder of an IFSuperResolutionPipeline that enlarges the model's images
    upscaler_steps: Annotated[int, Field(ge=1, le=1000)] = 50  # of the scheduler that the upscaler was saved with
    upscaler_noise_level: Annotated[int, Field(ge=0, lt=1000)] = 250  # timestep the enlarged images are noised to
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    device: str = "auto"
    channels_last: bool = True
    compile: Literal["auto"] | bool = "auto"  # torch.compile the network; auto: where the run repays it
    graph: Literal["auto"] | bool = "auto"  # replay the network's evaluations as CUDA graphs; auto: on a GPU
    attention_cache: Annotated[int, Field(ge=1)] = 1  # compute attention at every n-th evaluation; an approximation
    debug_nan: bool = False  # log the evaluation in which an image first stops being finite

    @model_validator(mode="after")
    def _interval(self) -> "ModelConfig":
        low, high = self.guidance_interval
        if low >= high:
            raise ValueError(f"guidance_interval is [from, to] with from below to, got [{low}, {high}]")
        return self

    @model_validator(mode="after")
    def _upscaler_has_model(self) -> "ModelConfig":
        if self.upscaler is not None and self.path is None:
            raise ValueError("upscaler needs path: the folder of the model whose images it enlarges")
        return self


class PriorConfig(Section):
    """A small UNet2DModel trained on the images when no model is given."""

    channels: list[int] = [32, 64]  # width of each resolution level
    steps: Annotated[int, Field(ge=1)] = 900
    batch_size: Annotated[int, Field(ge=1)] = 128
    lr: Annotated[float, Field(gt=0)] = 2e-3
    labels: bool | Literal["all"] = (
        False  # class-conditional: told the labels that data.shots leaves, or "all" there are
    )
    seed: Seed = 0


class DdimConfig(Section):
    """The `ddim` method: the solver run backwards, from the image to the noise it comes from."""

    steps: Annotated[int, Field(ge=1, le=1000)] | None = None  # of the reverse pass; null: model.steps
    depth: Annotated[float, Field(gt=0, le=1)] = 1.0  # share of the schedule that is run backwards
    iterations: Annotated[int, Field(ge=0)] = 5  # fixed-point iterations a step; 0 takes each step as it comes
    guidance: Annotated[float, Field(ge=0)] = 1.0  # classifier-free scale of the reverse pass; 1 and below are off


class EmbeddingConfig(Section):
    """The `embedding` method: Diffusion Inversion (Zhou et al. 2023), one conditioning matrix for each image."""

    tokens: Annotated[int, Field(ge=1)] = 5  # rows of the matrix, for models that take tokens
    visits: Annotated[int, Field(ge=1)] = 3000  # how often each image is looked at, at most
    batch_size: Annotated[int, Field(ge=1)] = 50
    group_rows: Annotated[int, Field(ge=1)] = 100  # images optimised together; their mean is the unconditional vector
    lr: Annotated[float, Field(gt=0)] = 3e-2
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    patience: Annotated[int, Field(ge=0)] = 300  # visits without a lower loss that end a group early; 0 never
    checkpoint_every: Annotated[int, Field(ge=1)] = 200  # optimizer steps between two savings of an unfinished group


Method = Literal["encode", "ddim", "embedding", "prompt"]


class BankConfig(Section):
    """The latent bank: how the labelled images are inverted and where the rows are kept."""

    path: ConfigPath | None = None  # null keeps the bank in the cache, named by what it was made from
    methods: Annotated[list[Method], Field(min_length=1)] = ["encode"]  # what each row holds; "prompt" alone: nothing
    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    shard_rows: Annotated[int, Field(ge=1)] = 4096
    device: Literal["auto", "mapped", "memory", "cuda"] = "auto"  # where a producer keeps it; auto: what has room
    score: bool = False  # also store the judge's score of what each row gives back
    ddim: DdimConfig = DdimConfig()
    embedding: EmbeddingConfig = EmbeddingConfig()

    @model_validator(mode="after")
    def _each_method_once(self) -> "BankConfig":
        if len(set(self.methods)) < len(self.methods):
            raise ValueError(f"methods names one twice: {', '.join(self.methods)}")
        return self


class Recipe(Section):
    """One way to vary a real image; a batch of orders uses one recipe, drawn by weight.

    noise: the image is noised to a depth and painted again (SDEdit). latent_noise: noise is mixed into its inverted
    latent. interpolate: two images' latents are mixed, as images noised to a depth or as inverted latents. embedding:
    fresh noise under c_i + alpha (c_j - c_i) + lambd noise of inverted embeddings (Diffusion Inversion). prompt: fresh
    noise, told the class alone.
    """

    kind: Literal["noise", "latent_noise", "interpolate", "embedding", "prompt"]
    weight: Annotated[float, Field(ge=0)] = 1.0
    classes: Annotated[list[str], Field(min_length=1)] | None = None  # only for these; null: for all
    depth: Range = (0.2, 0.5)  # noise, interpolate: share of the noise schedule that is run, in (0, 1]
    strength: Range = (0.1, 0.4)  # latent_noise: share of noise in the inverted latent
    latents: Literal["image", "inverted"] = "image"  # interpolate: what is mixed
    mode: Literal["linear", "spherical", "circle"] = "linear"  # interpolate: how the two anchors combine
    pairs: Literal["same", "nearest", "mixed"] = "same"  # the partner: of the class, its neighbour there, of another
    neighbours: Annotated[int, Field(ge=1)] = 5  # pairs "nearest": how many of the nearest are drawn from
    t: Range = (0.0, 0.5)  # interpolate: weight of the partner; on the circle, the share of it that is gone round
    alpha: Range = (0.1, 0.1)  # embedding: weight of the partner
    lambd: Range = (0.1, 0.1)  # embedding: weight of the noise
    conditioning: Literal["label", "embedding"] = "label"  # what the network is told: class or prompt, or bank rows
    guidance: Range = (1.0, 1.0)  # classifier-free guidance scale; 1 and below are off
    classifier_guidance: Range = (0.0, 0.0)  # scale of the judge's gradient; 0 is off

    @property
    def rows(self) -> Literal["latent", "inverted"] | None:
        """The bank's tensor that images of this recipe start from; None for fresh noise."""
        if self.kind in ("embedding", "prompt"):
            return None
        inverted = self.kind == "latent_noise" or (self.kind == "interpolate" and self.latents == "inverted")
        return "inverted" if inverted else "latent"

    @property
    def by_embedding(self) -> bool:
        """Whether the network is told the bank's inverted embeddings."""
        return self.kind == "embedding" or self.conditioning == "embedding"

    @model_validator(mode="after")
    def _ranges(self) -> "Recipe":
        bounds = {
            "depth": (0.0, 1.0),
            "strength": (0.0, 1.0),
            "t": (0.0, 1.0),
            "alpha": (0.0, 1.0),
            "lambd": (0.0, 10.0),
            "guidance": (0.0, 100.0),
            "classifier_guidance": (0.0, 1000.0),
        }
        for name, (low, high) in bounds.items():
            lo, hi = getattr(self, name)
            if not (low <= lo <= hi <= high):
                raise ValueError(f"{name} is a range [low, high] within [{low:g}, {high:g}], got [{lo}, {hi}]")
        if self.depth[1] <= 0:
            raise ValueError("depth must reach above 0: at depth 0 nothing is generated")
        return self

    @model_validator(mode="after")
    def _fits_kind(self) -> "Recipe":
        """Refuse a setting that this kind would pass over in silence."""
        given = {name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default}
        for name in sorted(given - _RECIPE_KEYS[self.kind] - _RECIPE_COMMON):
            takers = [kind for kind, keys in _RECIPE_KEYS.items() if name in keys]
            raise ValueError(f"kind '{self.kind}' takes no {name}; it belongs to: {', '.join(takers)}")
        if self.kind == "interpolate" and self.mode == "circle" and self.latents == "image":
            raise ValueError("mode circle goes round two inverted latents: set latents to inverted")
        if self.kind == "interpolate" and self.mode == "circle" and self.pairs == "mixed":
            raise ValueError("on a circle the share of each class is not t: set pairs to same or nearest")
        if self.kind == "prompt" and self.conditioning == "embedding":
            raise ValueError("kind 'prompt' has no bank row to take an embedding from: use kind embedding")
        return self


_RECIPE_COMMON = {"kind", "weight", "classes", "conditioning", "guidance", "classifier_guidance"}
_RECIPE_KEYS = {
    "noise": {"depth"},
    "latent_noise": {"strength"},
    "interpolate": {"depth", "latents", "mode", "pairs", "neighbours", "t"},
    "embedding": {"alpha", "lambd", "pairs", "neighbours"},
    "prompt": set(),
}


class JudgeConfig(Section):
    """The confidence filter: which classifier scores the images and what it lets through."""

    enabled: bool = True
    classifier: str = "small_cnn"
    weights: ConfigPath | None = None  # safetensors; null fits the classifier on the labelled images
    steps: Annotated[int, Field(ge=1)] = 300
    lr: Annotated[float, Field(gt=0)] = 2e-3
    features: bool = False  # average it with a linear probe on the denoiser's own features
    feature_timestep: Annotated[float, Field(ge=0)] = 200  # the timestep at which the denoiser reads an image for that
    rule: Literal["auto", "fixed", "calibrated"] = "auto"  # auto: fixed below 10 images a class
    top_k: Annotated[int, Field(ge=1)] = 3
    floor: Fraction = 0.2  # fixed rule: an unsure judge must give the label at least this
    confident: Fraction = 0.8  # fixed rule: above this, disagreement is a rejection
    quantile: Fraction = 0.05  # calibrated rule: share of real images the thresholds may reject
    min_score: Fraction = 0.0  # reject when the label's probability is below this, whatever the rule says
    too_easy: Fraction | None = None  # reject when the label's probability exceeds this


class StreamConfig(Section):
    """How orders become images: batch shape, producers, memory, and what to do when starved."""

    batch_size: Annotated[int, Field(ge=1)] = 64  # images per order batch, fixed for the whole run
    in_flight: Annotated[int, Field(ge=1)] = 4  # order batches issued ahead; independent of producers
    producers: Annotated[int, Field(ge=1)] = 1
    shared: bool = False  # one set of producers for all ranks of this machine, instead of one for each
    backend: Literal["auto", "local", "process"] = "auto"
    start_method: Literal["auto", "spawn", "forkserver"] = "auto"  # of producers' processes
    threads: Annotated[int, Field(ge=1)] = 1  # CPU threads per producer
    nice: Annotated[int, Field(ge=0, le=19)] = 0
    devices: list[Annotated[int, Field(ge=0)] | str] = []  # GPUs, by index or UUID, dealt out to producers in turn
    memory: Literal["auto", "memfd", "shm", "file", "pinned", "cuda"] = "auto"
    deliver_on: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] = "cpu"  # where `take` hands out images
    huge_pages: bool = False  # for host memory, where the system has them
    starved: Literal["wait", "reuse", "real"] = "wait"
    max_reuse: Annotated[int, Field(ge=1)] = 4
    in_order: bool = True
    max_restarts: Annotated[int, Field(ge=0)] = 3  # consecutive deaths without progress
    max_empty: Annotated[int, Field(ge=1)] = 20  # consecutive batches without an accepted image
    start_timeout: Annotated[float, Field(gt=0)] = 180.0  # seconds until a producer must be ready
    stall_timeout: Annotated[float, Field(gt=0)] = 30.0  # seconds without progress before it is reported
    hang_timeout: Annotated[float, Field(gt=0)] = 120.0  # seconds before a hung producer is replaced
    kernels: Literal["auto", "torch", "triton"] = "auto"
    manifest: ConfigPath | None = None  # record of deliveries for `streamaug replay`; of several ranks: .rankN

    @model_validator(mode="after")
    def _processes_are_shared(self) -> "StreamConfig":
        if self.shared and self.backend == "local":
            raise ValueError("shared needs producers that are processes, and backend local has none: process works")
        return self


class LoaderConfig(Section):
    """How synthetic images enter the batch.

    ratio: the synthetic share of what is delivered: a number; or for each class ({cat: 0.5, default: 0.2}); or a
    schedule by delivered batches ({schedule: warmup, ratio: 0.5, steps: 1000} or {schedule: cosine, ...}).
    """

    ratio: float | dict[str | int, Any] = 0.5
    mode: Literal["replace", "append"] = "replace"
    displaced: Literal["drop", "defer"] = "drop"

    @property
    def peak_ratio(self) -> float:
        """The largest share that any class gets, or that the schedule reaches."""
        if not isinstance(self.ratio, dict):
            return self.ratio
        names = {"ratio", "start", "end"} if "schedule" in self.ratio else set(self.ratio)
        return max(float(self.ratio[name]) for name in names & set(self.ratio))

    @field_validator("ratio", mode="plain")
    @classmethod
    def _is_a_ratio(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return cls._share(value)
        if "schedule" not in value:
            if not value:
                raise ValueError("a mapping of classes to shares is empty; {default: 0.5} names all classes")
            return {key: cls._share(share, f"class {key!r}: ") for key, share in value.items()}
        keys = {"warmup": {"ratio", "steps", "start"}, "cosine": {"ratio", "steps", "end", "warmup"}}
        kind = value["schedule"]
        if not isinstance(kind, str) or kind not in keys:
            raise ValueError(f"schedule {kind!r}: accepted are warmup and cosine{nearest(str(kind), keys)}")
        for name in value.keys() - {"schedule"}:
            if name not in keys[kind]:
                accepted = ", ".join(sorted(keys[kind]))
                raise ValueError(f"schedule {kind} takes no {name!r}{nearest(str(name), keys[kind])}: {accepted}")
        for name in ("ratio", "steps"):
            if name not in value:
                raise ValueError(f"schedule {kind} needs {name}: {{schedule: {kind}, ratio: 0.5, steps: 1000}}")
        steps, warmup = value["steps"], value.get("warmup", 0)
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps is a number of batches from 1, got {steps!r}")
        if not isinstance(warmup, int) or not 0 <= warmup < steps:
            raise ValueError(f"warmup is a number of batches from 0 to below steps, got {warmup!r}")
        shares = {name: cls._share(value[name], f"{name}: ") for name in ("ratio", "start", "end") if name in value}
        return {**value, **shares}

    @staticmethod
    def _share(value: Any, what: str = "") -> float:
        try:
            share = float(value)
        except (TypeError, ValueError):
            raise ValueError(f"{what}expected a number in [0, 1), got {value!r}") from None
        if not share >= 0:
            raise ValueError(f"{what}input should be greater than or equal to 0, got {value!r}")
        if share >= 1:
            raise ValueError(f"{what}input should be less than 1, got {value!r}")
        return share


class AugmentConfig(Section):
    """Classical augmentation of the training batch, the same in every arm."""

    rotation: Annotated[float, Field(ge=0)] = 10.0  # degrees, ±
    shift: Fraction = 0.25  # share of the image side, ±
    scale: Fraction = 0.1  # ±
    flip: bool = False


class TrainConfig(Section):
    classifier: str = "small_cnn"
    steps: Annotated[int, Field(ge=1)] = 500
    batch_size: Annotated[int, Field(ge=1)] = 64
    lr: Annotated[float, Field(gt=0)] = 2e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    label_smoothing: Fraction = 0.0
    augment: AugmentConfig = AugmentConfig()
    threads: Annotated[int, Field(ge=1)] = 1


class ArmConfig(Section):
    """What tuning may choose per arm; null keeps the value of `train`."""

    lr: Annotated[float, Field(gt=0)] | None = None
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    label_smoothing: Fraction | None = None


class DemoConfig(Section):
    seeds: Annotated[int, Field(ge=1)] = 5
    real_only: ArmConfig = ArmConfig()


class Config(Section):
    seed: Seed = 0
    cache: ConfigPath = Field(default="${STREAMAUG_CACHE:-~/.cache/streamaug}", validate_default=True)  # type: ignore[assignment]
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    prior: PriorConfig | None = None
    bank: BankConfig = BankConfig()
    recipes: Annotated[list[Recipe], Field(min_length=1)] = [Recipe(kind="noise")]
    judge: JudgeConfig = JudgeConfig()
    stream: StreamConfig = StreamConfig()
    loader: LoaderConfig = LoaderConfig()
    train: TrainConfig = TrainConfig()
    demo: DemoConfig = DemoConfig()

    @model_validator(mode="after")
    def _has_generator(self) -> "Config":
        if self.model.path is None and self.prior is None:
            raise ValueError(
                "no generator: set model.path to a diffusers folder, or add a prior: section to train a small one"
            )
        if not any(recipe.weight > 0 for recipe in self.recipes):
            raise ValueError("every recipe has weight 0: give at least one a positive weight")
        return self

    def digest(self, *sections: str) -> str:
        """Hash of the named sections: two configurations with equal digests agree in them."""
        values = self.model_dump(mode="json", include=set(sections) or None)
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, default_flow_style=None)


def load(path: str | os.PathLike, overrides: Overrides = ()) -> Config:
    """Read a YAML file, or the name of a bundled configuration ("digits"), into a `Config`.

    `overrides` are "a.b=value" strings (the value is YAML; lists are indexed by number), or a mapping of such keys to
    values, applied after the file.
    Raises ConfigError, whose message carries the file and the key's path, on anything that cannot be used.
    """
    text, where = _read(path)
    return parse(text, where, overrides)


def parse(text: str, where: str = "<string>", overrides: Overrides = ()) -> Config:
    """Like `load`, from the YAML text itself; `where` is how messages name it."""
    values = _plain_yaml(text, where)
    if values is None:
        raise ConfigError(f"{where}: the file is empty; `streamaug config show digits` prints a complete one")
    if not isinstance(values, dict):
        raise ConfigError(
            f"{where}: expected sections (data:, model:, ...), found a {type(values).__name__}: {str(values)[:60]!r}"
        )
    for override, key, value in _each(overrides):
        _apply(values, override, key, value)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{where}: {_describe(item)}" for item in error.errors())) from None


def bundled() -> list[str]:
    """Names of the configurations that travel with the package."""
    folder = importlib.resources.files("streamaug.configs")
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def _read(path: str | os.PathLike) -> tuple[str, str]:
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(
            f"a configuration is a YAML file or a bundled name ({', '.join(bundled())}), got a {type(path).__name__}; "
            'single settings go into overrides: {"data.root": "images"}'
        )
    file = Path(path)
    try:
        if not file.exists() and str(path) in bundled():
            return (importlib.resources.files("streamaug.configs") / f"{path}.yaml").read_text(), str(path)
        return file.read_text(encoding="utf-8"), str(path)
    except FileNotFoundError:
        siblings = [item.name for item in file.parent.glob("*.y*ml")] if file.parent.is_dir() else []
        hint = nearest(file.name, [*siblings, *bundled()]) or f"; bundled configurations: {', '.join(bundled())}"
        raise ConfigError(f"{path}: no such file{hint}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: a folder, expected a YAML file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file, expected YAML") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


class _PlainLoader(yaml.SafeLoader):
    """Safe loading that refuses what YAML would pass over in silence: a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"'{key.value}' is given twice", problem_mark=key.start_mark)
            seen.append(key.value)
        return super().construct_mapping(node, deep)


def _plain_yaml(text: str, where: str) -> Any:
    """The text's value, built from plain YAML only. Raises ConfigError."""
    try:
        return yaml.load(text, _PlainLoader)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        if "could not determine a constructor" in problem:
            problem = f"only plain YAML is accepted, no Python tags{_line(error)}: {problem}"
            raise ConfigError(f"{where}: {problem}") from None
        raise ConfigError(f"{where}: not YAML{_line(error)}: {problem}") from None
    except ValueError as error:  # a date or number that looks like one and is none
        raise ConfigError(f"{where}: not YAML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{where}: not YAML: nested too deeply") from None


def _line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f" (line {mark.line + 1})" if mark else ""


def _each(overrides: Overrides) -> Iterator[tuple[str, str, Any]]:
    """How messages name it, its key and its value. Raises ConfigError."""
    if isinstance(overrides, str):
        raise ConfigError(f"overrides: a list of such strings, or a mapping, is expected: [{overrides!r}]")
    if isinstance(overrides, Mapping):
        yield from ((f"{key}={value}", str(key), value) for key, value in overrides.items())
        return
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {override}: expected key=value, such as loader.ratio=0.25")
        yield override, key, _plain_yaml(text, f"--set {override}")


def _apply(values: dict, override: str, key: str, value: Any) -> None:
    *parents, last = key.strip().split(".")
    node: Any = values
    for part in parents:
        if isinstance(node, list):
            node = node[_index(node, part, override)]
        else:
            if not isinstance(node.get(part), dict | list):
                node[part] = {}
            node = node[part]
    if isinstance(node, list):
        node[_index(node, last, override)] = value
    else:
        node[last] = value


def _index(items: list, part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise ConfigError(f"--set {override}: {part!r} is no index of a list with {len(items)} entries")
    return int(part)


def _describe(item: Any) -> str:
    """One validation error as 'key.path: what is wrong (what would work)'."""
    location = [part for part in item["loc"] if part not in _UNION_TAGS]
    key = ".".join(str(part) for part in location)
    given = item.get("input")
    if item["type"] == "extra_forbidden":
        known = _keys_at(location[:-1])
        return f"unknown key '{key}'{nearest(str(location[-1]), known)}; accepted here: {', '.join(sorted(known))}"
    if item["type"] in ("value_error", "assertion_error"):
        message = str(item["ctx"]["error"])
        return f"{key}: {message}" if key else message
    if item["type"] == "missing":
        return f"{key}: missing"
    if item["type"] == "path_type":
        return f"{key}: expected a path, got {given!r}"
    return f"{key}: {item['msg'][0].lower()}{item['msg'][1:]}, got {given!r}"


_UNION_TAGS = {
    "list[str]",
    "dict[str,list[str]]",
    "function-before[_expand_path(), path]",
    "constrained-int",
    "constrained-float",
}


def _keys_at(location: Sequence[Any]) -> list[str]:
    """The keys the schema accepts at a location."""
    section: Any = Config
    for part in location:
        if isinstance(part, int):
            continue
        section = _section_of(section.model_fields[part].annotation)
    return list(section.model_fields)


def _section_of(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in get_args(annotation) if get_origin(annotation) else ():
        found = _section_of(argument)
        if found is not None:
            return found
    return None

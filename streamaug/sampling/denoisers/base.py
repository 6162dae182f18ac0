"""What every family's adapter shares: what is known of a model folder, how weights are read, how the network is run."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from streamaug.errors import ModelError, nearest
from streamaug.orders import OrderBatch
from streamaug.sampling.caching import AttentionCache
from streamaug.sampling.network import compile_network, laid_out

_log = logging.getLogger("streamaug")

_PIXELS_AT_ONCE = 1 << 20  # decoded together, a few GiB of activations in fp32: four images of 512x512

Conditioning = dict[str, torch.Tensor]
"""What the network is told besides latent and timestep; every first axis is B, or 2B with the unconditional half
first. The keys are the family's own."""

Rows = Mapping[str, torch.Tensor]
"""An order batch's mixed bank rows, inverted embeddings [B, ...] by name, and what the unconditional half is told in
their place, "null." + name, [B, ...] or one for all [...] (`latents.row_conditioning`)."""

NULL = "null."


@dataclass(frozen=True)
class ModelInfo:
    """What can be known of a model folder without reading its weights.

    family: the key in FAMILIES; pipeline: the class in model_index.json; image_shape: (C, H, W) of the images it
    makes; latent_shape: (c, h, w) of what the sampler works on; conditioning: what a label becomes; num_classes: how
    many class embeddings, 0 when it has none; null_class: the label that means "no class", if the model itself says;
    guidance: "cfg" takes two halves, "embedded" takes the scale as an input, "none" knows no condition to leave out;
    digest: hash of configuration and weights; upscaler: a cascade's second stage, which makes the image_shape;
    label_names: what the model calls its labels, where it says; class_ids: the label of each of the data's classes,
    where they were found among those names (`with_class_ids`), None when a class's label is its own number.
    """

    path: Path
    family: str
    pipeline: str
    image_shape: tuple[int, int, int]
    latent_shape: tuple[int, int, int]
    conditioning: Literal["none", "class", "prompt"]
    num_classes: int
    null_class: int | None
    guidance: Literal["none", "cfg", "embedded"]
    digest: str
    upscaler: "ModelInfo | None" = None
    label_names: tuple[str, ...] = ()
    class_ids: tuple[int, ...] | None = None

    @property
    def pixels(self) -> bool:
        """Whether the latent is the image itself."""
        return self.latent_shape == self.image_shape


def with_class_ids(info: ModelInfo, class_names: Sequence[str]) -> ModelInfo:
    """The model with the data's classes found among its labels, by name; the same where not all of them are there.

    A label may have several names with commas between them, as ImageNet's have.
    """
    label_of = {
        name.strip().lower(): label for label, names in enumerate(info.label_names) for name in names.split(",")
    }
    found = [label_of.get(name.strip().lower().replace("_", " ")) for name in class_names]
    if not label_of or not found:
        return info
    missing = [name for name, label in zip(class_names, found, strict=True) if label is None]
    if missing:
        _log.warning(
            "%s does not name %s among its labels, so class 0 of the data is told as its label 0, '%s', and so on",
            info.path,
            ", ".join(missing)[:200],
            info.label_names[0],
        )
        return info
    _log.info("%s: the data's classes are its labels of the same names", info.path)
    return replace(info, class_ids=tuple(label for label in found if label is not None))


@dataclass(frozen=True)
class LoadSettings:
    """How a model is run: what `Denoiser.load` needs besides its folder.

    prompts: the file of encoded prompts (`conditioning.encode_prompts`), for families that take one; null_class: the
    label that means "no class", where the model has one; tiny_vae: folder of an AutoencoderTiny that decodes instead
    of the model's own autoencoder; variant: "fp16" reads diffusion_pytorch_model.fp16.safetensors; attention_cache:
    attention is computed at every n-th evaluation (`caching.AttentionCache`), 1 at each; embedded_guidance: the scale
    that a model of embedded guidance is told, None for each image's own; original_size, target_size: the sides in
    pixels of SDXL's size conditions, None for its own.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    channels_last: bool = True
    compile: bool = False
    null_class: int | None = None
    prompts: Path | None = None
    tiny_vae: Path | None = None
    variant: str | None = None
    attention_cache: int = 1
    embedded_guidance: float | None = None
    original_size: int | None = None
    target_size: int | None = None


class Denoiser:
    """An adapter between a diffusers network and the sampler. A family subclasses it in a file of its own.

    network: the diffusers module; learned_variance: whether the output has twice the latent's channels, the second
    half a variance; vae: the autoencoder (`autoencoder.Autoencoder`) whose latents it makes, None for a pixel model.
    """

    learned_variance: bool = False
    vae: Any = None

    def __init__(self, network: Any, info: ModelInfo | None, settings: LoadSettings):
        network = network.to(settings.device).eval().requires_grad_(False)
        network = laid_out(network, settings.channels_last)
        if settings.compile:
            compile_network(network)
        self._attention = AttentionCache(network, settings.attention_cache) if settings.attention_cache > 1 else None
        self.network, self.info, self.settings = network, info, settings
        self.device, self.dtype = settings.device, network.dtype

    @property
    def guidance(self) -> Literal["none", "cfg", "embedded"]:
        """As in ModelInfo; a model that is told a fixed scale can take two halves besides."""
        assert self.info is not None
        return "cfg" if self.settings.embedded_guidance is not None else self.info.guidance

    def told_scale(self, order: OrderBatch, guided: bool) -> torch.Tensor:
        """The guidance scale that the network takes as an input: fp32 [B], or [2B] when guided, on the device."""
        fixed = self.settings.embedded_guidance
        scale = torch.from_numpy(order.images["guidance"].copy()).to(self.device)
        return (scale if fixed is None else torch.full_like(scale, fixed)).repeat(1 + guided)

    def forget(self) -> None:
        """Reuse nothing of the evaluations before: to be called when another batch begins, or its shape changes."""
        if self._attention is not None:
            self._attention.forget()

    def condition(self, order: OrderBatch, rows: Rows, guided: bool) -> Conditioning:
        """What this batch's images are conditioned on: [B, ...], or [2B, ...] when guided."""
        raise NotImplementedError

    def class_rows(self, labels: np.ndarray) -> dict[str, torch.Tensor]:
        """What the network is told of labels int64 [n], as rows that may be varied: [n, ...] by name.

        `condition` takes them back in orders of template -1, and lets gradients through. Raises ModelError.
        """
        raise NotImplementedError

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """The network's output for x [n, c, h, w] in `dtype`, [n, c or 2c, h, w].

        timestep: fp32 [], or [n] where gradients are taken.
        """
        raise NotImplementedError

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [B, c, h, w] to images [B, C, H, W] in [-1, 1]; the same for a pixel model."""
        return latents if self.vae is None else self.vae.decode(latents)

    @property
    def decoded_at_once(self) -> int | None:
        """How many images `decoded` makes at a time, None for all: an autoencoder's layers are as large as images."""
        if self.vae is None or self.info is None:
            return None
        _, height, width = self.info.image_shape
        return max(1, _PIXELS_AT_ONCE // (height * width))

    def decoded(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        """`decode`'s images in parts [n, C, H, W], first to last, so that a large batch takes no more memory."""
        for part in latents.split(self.decoded_at_once or len(latents)):
            yield self.decode(part)

    @property
    def feature_size(self) -> int:
        """How many features `features` returns for an image; for families with FEATURES."""
        raise NotImplementedError

    def features(self, images: torch.Tensor, timestep: float) -> torch.Tensor:
        """What the network makes of images [B, C, H, W] in [-1, 1]: [B, feature_size]; for families with FEATURES."""
        raise NotImplementedError


def conditional_half(conditioning: Conditioning) -> Conditioning:
    """The second half of a guided conditioning: what an unguided evaluation of the same images takes."""
    return {name: value[len(value) // 2 :] for name, value in conditioning.items()}


def by_rows(order: OrderBatch) -> bool:
    """Whether the batch's images are conditioned on bank rows: a batch is of one recipe, so all are or none."""
    return bool((order.images["template"] < 0).all())


def mixed(order: OrderBatch) -> bool:
    """Whether some of the batch's images have mixed labels."""
    return bool((order.images["label_mix"] > 0).any())


def mixed_rows(order: OrderBatch, rows_of: Callable[[np.ndarray], Rows]) -> dict[str, torch.Tensor]:
    """What images of mixed labels are told: the rows of both classes, mixed as the labels are; a null as it is.

    rows_of: labels int64 [B] to rows [B, ...], and "null." + name [...].
    """
    images = order.images
    first, second = (rows_of(images[name]) for name in ("label", "label_b"))
    told = dict(first)
    for name in first:
        if not name.startswith(NULL):
            share = torch.from_numpy(images["label_mix"].copy()).to(first[name])
            told[name] = torch.lerp(first[name], second[name], share.view(-1, *(1,) * (first[name].dim() - 1)))
    return told


def row_halves(rows: Rows, names: Sequence[str], guided: bool) -> Conditioning:
    """The named rows [B, ...], or [2B, ...] with the null rows first when guided.

    Raises ModelError when there are no rows, or none of a name.
    """
    if not rows:
        raise ModelError("the recipe is conditioned on inverted embeddings, but the bank has none")
    there = [name for name in rows if not name.startswith(NULL)]
    if not set(names) <= set(there):
        raise ModelError(
            f"the model is conditioned on {' and '.join(names)}, the bank's inverted embeddings have only "
            f"{', '.join(there)}: invert again with this model, or set the recipe's conditioning to label"
        )
    if not guided:
        return {name: rows[name] for name in names}
    return {name: torch.cat([rows[NULL + name].expand_as(rows[name]), rows[name]]) for name in names}


def read_json(path: Path, name: str) -> dict[str, Any]:
    """A JSON object from a model folder. Raises ModelError when the folder is none of diffusers'."""
    if not path.is_dir():
        raise ModelError(f"{path}: no such folder; model.path is a folder saved by a diffusers pipeline")
    try:
        content = json.loads((path / name).read_text())
        if not isinstance(content, dict):
            raise ValueError(f"expected a JSON object, found a {type(content).__name__}")
        return content
    except FileNotFoundError:
        raise ModelError(
            f"{path}: no {name}, so this is not a diffusers model folder (one saved by pipeline.save_pretrained)"
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path / name}: cannot be read: {error}") from None


def weight_files(path: Path, component: str, variant: str | None = None) -> list[Path]:
    """The safetensors files of one component, shards included. Raises ModelError when there are none."""
    stems = {
        file: file.name.removesuffix(".safetensors")
        for file in sorted((path / component).glob("*.safetensors"))
        if file.name.startswith(("diffusion_pytorch_model", "model"))
    }
    if variant:
        found = [file for file, stem in stems.items() if f".{variant}" in stem]
    else:
        found = [file for file, stem in stems.items() if "." not in stem]
    if not found:
        variants = sorted({stem.partition(".")[2].partition("-")[0] for stem in stems.values() if "." in stem})
        pickled = sorted(file.name for file in (path / component).glob("*.bin"))
        hint = ""
        if variants:
            hint = f"; set model.variant to one of: {', '.join(variants)}"
        elif pickled:
            hint = f", and {pickled[0]} is not read: it is pickled; save the pipeline with safe_serialization=True"
        stem = "model" if component.startswith("text_encoder") else "diffusion_pytorch_model"
        infix = f".{variant}" if variant else ""
        raise ModelError(
            f"{path}: no {component}/{stem}{infix}.safetensors; weights are read from safetensors only{hint}"
        )
    return found


def digest_of(path: Path, components: Sequence[str], variant: str | None = None, others: Sequence[Path] = ()) -> str:
    """Hash of the configuration and weights of the named components, the scheduler's configuration and other files.

    Also of the scheduler's class, where model_index.json names another than the configuration.
    """
    files = [path / "scheduler" / "scheduler_config.json", *others]
    for component in components:
        files += [path / component / "config.json", *weight_files(path, component, variant)]
    digest, named = digest_of_files(files), _scheduler_name(path, "scheduler")
    if named == read_json(path, "scheduler/scheduler_config.json").get("_class_name"):
        return digest
    return hashlib.sha256(f"{digest} {named}".encode()).hexdigest()[:16]


def digest_of_files(files: Iterable[Path]) -> str:
    """Hash of what the files hold, in their order. Raises ModelError."""
    digest = hashlib.sha256()
    for each in files:
        try:
            with open(each, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise ModelError(f"{each}: cannot be read: {error.strerror}") from None
    return digest.hexdigest()[:16]


def square(path: Path, name: str, value: Any) -> tuple[int, int]:
    """A configuration's size, an int or [height, width], as (height, width). Raises ModelError for anything else."""
    sides = [value, value] if isinstance(value, int) else value
    if not (isinstance(sides, list) and len(sides) == 2 and all(isinstance(side, int) for side in sides)):
        raise ModelError(
            f"{path}: {name} has sample_size {value!r}, so the image size is unknown; "
            "set it there to the image's side in pixels, or to [height, width]"
        )
    return sides[0], sides[1]


def multiple_of(path: Path, size: int, multiple: int) -> int:
    """The size itself. Raises ModelError naming the nearest size when it is no multiple of what the model needs."""
    if size % multiple:
        below, above = size // multiple * multiple, (size // multiple + 1) * multiple
        near = f"{below} or {above}" if below else f"{above}"
        raise ModelError(
            f"{path}: this model makes images whose sides are multiples of {multiple}, data.image_size is {size}; "
            f"the nearest that works: {near}"
        )
    return size


def load_network(cls: Any, info: ModelInfo, component: str, *, dtype: torch.dtype, variant: str | None = None) -> Any:
    """One component's weights as a diffusers module; raises ModelError when they do not fit or are not finite."""
    try:
        network, loading = cls.from_pretrained(
            info.path / component,
            torch_dtype=dtype,
            variant=variant,
            use_safetensors=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise ModelError(
            f"{info.path}: the weights cannot be loaded (truncated, or of another architecture than "
            f"{component}/config.json): {error}"
        ) from None
    missing = loading["missing_keys"]
    if missing:
        raise ModelError(
            f"{info.path}: {len(missing)} tensors that {component}/config.json asks for are not among the weights, "
            f"first {missing[0]}; save the model again with pipeline.save_pretrained"
        )
    broken = [name for name, value in network.state_dict().items() if not torch.isfinite(value).all()]
    if broken:
        raise ModelError(f"{info.path}: weights with NaN or infinity, first in {broken[0]} ({len(broken)} tensors)")
    # from_pretrained leaves the stored dtype when the first tensor is a buffer of it, as in Stable Diffusion 3.
    return network if network.dtype == dtype else network.to(dtype)


def saved_scheduler(path: Path, component: str = "scheduler") -> Any:
    """The scheduler object a model folder was saved with, of the class that its model_index.json names."""
    import diffusers

    name = _scheduler_name(path, component)
    known = [each for each in dir(diffusers) if each.endswith("Scheduler")]
    if name not in known:
        raise ModelError(f"{path}: the scheduler {name!r} is not one of diffusers'{nearest(str(name), known)}")
    try:
        return getattr(diffusers, name).from_pretrained(path / component)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ModelError(f"{path}: the scheduler {name} cannot be made from its configuration: {error}") from None


def _scheduler_name(path: Path, component: str) -> str:
    """The class that model_index.json names, by which a pipeline goes; else that of the scheduler's configuration."""
    entry = read_json(path, "model_index.json").get(component)
    named = entry[-1] if isinstance(entry, list) and entry else None
    return str(named or read_json(path, f"{component}/scheduler_config.json").get("_class_name", ""))

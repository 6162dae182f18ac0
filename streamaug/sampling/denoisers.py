"""Denoisers: one adapter per model family between a diffusers model and the sampler."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from streamaug.errors import ModelError, nearest

FAMILIES = ("UNet2DModel",)


@dataclass(frozen=True)
class ModelInfo:
    """What can be known of a model folder without reading its weights.

    image_shape: (C, H, W) of the images it makes; num_classes: how many class embeddings, 0 when unconditional;
    digest: hash of configuration and weights.
    """

    path: Path
    family: str
    image_shape: tuple[int, int, int]
    num_classes: int
    digest: str


def inspect(path: Path) -> ModelInfo:
    """Read a diffusers pipeline folder's configuration. Raises ModelError naming what is missing or not supported."""
    index = _json(path, "model_index.json")
    family = next((value[1] for key, value in index.items() if key == "unet" and isinstance(value, list)), None)
    if family not in FAMILIES:
        raise ModelError(
            f"{path}: {index.get('_class_name', 'this pipeline')} with {family or 'no unet'} is not supported; "
            f"supported denoisers: {', '.join(FAMILIES)}"
        )
    unet = _json(path, "unet/config.json")
    _json(path, "scheduler/scheduler_config.json")
    weights = path / "unet" / "diffusion_pytorch_model.safetensors"
    if not weights.is_file():
        raise ModelError(f"{path}: no unet/{weights.name}; weights are read from safetensors only")
    size = unet.get("sample_size")
    sides = [size, size] if isinstance(size, int) else size
    if not (isinstance(sides, list) and len(sides) == 2 and all(isinstance(side, int) for side in sides)):
        raise ModelError(
            f"{path}: unet/config.json has sample_size {size!r}, so the image size is unknown; "
            "set it there to the image's side in pixels, or to [height, width]"
        )
    channels, predicted = unet.get("in_channels", 3), unet.get("out_channels", 3)
    if channels != predicted:
        raise ModelError(
            f"{path}: the unet takes {channels} channels and predicts {predicted} (a learned variance?); "
            "accepted are models that predict as many channels as they take"
        )
    classes = unet.get("num_class_embeds") or 0
    return ModelInfo(path, family, (channels, sides[0], sides[1]), classes, _digest(path))


def _json(path: Path, name: str) -> dict[str, Any]:
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


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    for name in (
        "unet/config.json",
        "scheduler/scheduler_config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ):
        with open(path / name, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def load_scheduler(path: Path) -> Any:
    """The scheduler object a model folder was saved with."""
    import diffusers

    name = _json(path, "scheduler/scheduler_config.json").get("_class_name", "")
    known = [each for each in dir(diffusers) if each.endswith("Scheduler")]
    if name not in known:
        raise ModelError(f"{path}: the scheduler {name!r} is not one of diffusers'{nearest(str(name), known)}")
    try:
        return getattr(diffusers, name).from_pretrained(path / "scheduler")
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ModelError(f"{path}: the scheduler {name} cannot be made from its configuration: {error}") from None


class UNet2D:
    """diffusers' UNet2DModel: pixels, unconditional or with a class label.

    Called as denoiser(x [B, C, H, W], timestep, labels int64 [B] or None) -> [B, C, H, W] in x's dtype.
    """

    def __init__(self, unet: Any, *, null_class: int | None, device: torch.device, channels_last: bool):
        self.unet = unet.to(device).eval().requires_grad_(False)
        if channels_last:
            self.unet = self.unet.to(memory_format=torch.channels_last)
        self.null_class = null_class
        self.num_classes = unet.config.num_class_embeds or 0
        self.device, self.dtype = device, unet.dtype

    @classmethod
    def load(
        cls,
        info: ModelInfo,
        *,
        null_class: int | None,
        device: torch.device,
        dtype: torch.dtype,
        channels_last: bool,
    ) -> "UNet2D":
        """Read the weights; raises ModelError when they do not fit the configuration or are not finite."""
        from diffusers import UNet2DModel

        try:
            unet, loading = UNet2DModel.from_pretrained(
                info.path / "unet",
                torch_dtype=dtype,
                use_safetensors=True,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            raise ModelError(
                f"{info.path}: the weights cannot be loaded (truncated, or of another architecture than "
                f"unet/config.json): {error}"
            ) from None
        missing = loading["missing_keys"]
        if missing:
            raise ModelError(
                f"{info.path}: {len(missing)} tensors that unet/config.json asks for are not among the weights, "
                f"first {missing[0]}; save the model again with pipeline.save_pretrained"
            )
        broken = [name for name, value in unet.state_dict().items() if not torch.isfinite(value).all()]
        if broken:
            raise ModelError(f"{info.path}: weights with NaN or infinity, first in {broken[0]} ({len(broken)} tensors)")
        return cls(unet, null_class=null_class, device=device, channels_last=channels_last)

    @property
    def conditional(self) -> bool:
        return self.num_classes > 0

    def conditioning(self, labels: np.ndarray, guided: bool) -> torch.Tensor | None:
        """Class labels [B], or [2B] with the unconditional half first when guided; None when unconditional."""
        if not self.conditional:
            return None
        wanted = torch.from_numpy(np.ascontiguousarray(labels)).to(self.device)
        if not guided:
            return wanted
        if self.null_class is None:
            raise ModelError("classifier-free guidance needs the class that means 'no class': set model.null_class")
        return torch.cat([torch.full_like(wanted, self.null_class), wanted])

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        return self.unet(x, timestep, class_labels=labels, return_dict=False)[0]

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """Latents to images in [-1, 1]: a pixel model's latent is the image."""
        return x

"""What the engine's benchmarks compare: networks with random weights, our sampler on them, and diffusers' own loop.

Three kinds: the digits prior (0.7 M parameters; class-conditional where it is guided), DiT-B/2 and Stable Diffusion
1.5; `small=True` keeps their layout and shrinks their width to what a CPU can time.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from streamaug.orders import ORDER_DTYPE, OrderBatch
from streamaug.sampling.denoisers.base import Denoiser, LoadSettings, ModelInfo
from streamaug.sampling.denoisers.dit import DiT
from streamaug.sampling.denoisers.prompts import PromptTable
from streamaug.sampling.denoisers.stable_diffusion import StableDiffusion
from streamaug.sampling.denoisers.unet2d import UNet2D
from streamaug.sampling.sampler import Sampler

KINDS = ("digits", "dit", "sd")
GUIDANCE = 7.5
CLASSES = 10


def latent_shape(kind: str, small: bool) -> tuple[int, int, int]:
    if kind == "digits":
        return 1, 8, 8
    side = 8 if small else 64 if kind == "sd" else 32
    return 4, side, side


def build(kind: str, *, small: bool, classes: bool = False, side: int = 8, device: str | torch.device = "cpu") -> Any:
    """A network of the kind, in fp32. classes: the digits network takes a label; side: its image.

    It is made on the device: on a CPU random weights of Stable Diffusion's size take ten seconds. The same device
    gives the same weights.
    """
    torch.manual_seed(0)
    with torch.device(device):
        return _network(kind, small, classes, side).to(device).eval().requires_grad_(False)


def _network(kind: str, small: bool, classes: bool, side: int) -> Any:
    from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel

    if kind == "digits":  # `prior.build_unet`, spelled out: that module needs more packages than a GPU machine may have
        network = UNet2DModel(
            sample_size=side,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
            attention_head_dim=16,
            num_class_embeds=CLASSES + 1 if classes else None,
        )
    elif kind == "dit":
        network = DiTTransformer2DModel(
            num_attention_heads=2 if small else 12,
            attention_head_dim=16 if small else 64,
            num_layers=2 if small else 12,
            out_channels=8,
            sample_size=latent_shape(kind, small)[1],
        )
    elif small:
        network = UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(32, 64, 64),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=64,
            attention_head_dim=8,
        )
    else:
        network = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    return network


@cache
def scheduler(kind: str) -> Any:
    from diffusers import DDIMScheduler

    if kind == "digits":
        return DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=True)
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def latents(kind: str, size: int, *, small: bool) -> torch.Tensor:
    return torch.randn(size, *latent_shape(kind, small), generator=torch.Generator().manual_seed(2))


def tokens(width: int) -> torch.Tensor:
    """Embeddings [2, 77, width] of the negative prompt and of a prompt."""
    return torch.randn(2, 77, width, generator=torch.Generator().manual_seed(1))


def orders(size: int, guidance: float) -> OrderBatch:
    images = np.zeros(size, ORDER_DTYPE)
    images["id"], images["guidance"] = np.arange(size), guidance
    return OrderBatch(0, 0, 0, 0, images)


def denoiser(kind: str, network: Any, settings: LoadSettings) -> Denoiser:
    """Our adapter on the network."""
    if kind == "digits":
        return UNet2D(network, None, settings)
    shape = (network.config.in_channels, network.config.sample_size, network.config.sample_size)
    conditioning = "class" if kind == "dit" else "prompt"
    info = ModelInfo(Path(), kind, kind, shape, shape, conditioning, 0, None, "cfg", "")  # type: ignore[arg-type]
    if kind == "dit":
        return DiT(network, info, settings, None)  # type: ignore[arg-type]
    null, prompt = tokens(network.config.cross_attention_dim).to(settings.device, network.dtype)
    table = PromptTable({"tokens": prompt[None, None]}, {"tokens": null})
    return StableDiffusion(network, info, settings, None, table)  # type: ignore[arg-type]


def ours(sampler: Sampler, x: torch.Tensor, guided: bool) -> Callable[[], torch.Tensor]:
    """Our sampler on one batch."""
    order = orders(len(x), GUIDANCE if guided else 1.0)
    return lambda: sampler.sample(x, order)


def loop(kind: str, network: Any, x: torch.Tensor, steps: int, guided: bool) -> Callable[[], torch.Tensor]:
    """The loop as diffusers' documentation writes it, on the network as it is given."""
    solver = type(scheduler(kind)).from_config(scheduler(kind).config)
    halves = 1 + guided
    conditioned: dict[str, Any] = {}
    device, dtype = network.device, network.dtype
    if kind == "sd":
        both = tokens(network.config.cross_attention_dim).to(device, dtype)
        conditioned["encoder_hidden_states"] = both[-halves:].repeat_interleave(len(x), 0)
    elif kind == "dit" or network.config.num_class_embeds:
        null = 1000 if kind == "dit" else CLASSES
        conditioned["class_labels"] = torch.tensor([null, 0], device=device)[-halves:].repeat_interleave(len(x))
    start = x.to(device, dtype)

    @torch.no_grad()
    def run() -> torch.Tensor:
        x = start
        solver.set_timesteps(steps, device=device)
        for t in solver.timesteps:
            given = solver.scale_model_input(torch.cat([x] * halves), t)
            timestep = t.expand(len(given)) if kind == "dit" else t
            out = network(given, timestep, **conditioned, return_dict=False)[0][:, : x.shape[1]]
            if guided:
                unconditional, conditional = out.chunk(2)
                out = unconditional + GUIDANCE * (conditional - unconditional)
            x = solver.step(out, t, x, return_dict=False)[0]
        return x

    return run

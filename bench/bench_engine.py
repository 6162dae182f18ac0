"""Sampling by our engine beside the diffusers pipeline it replaces: 20 DDIM steps, random weights, nothing decoded.

The digits prior unguided; the SD-1.5-shaped network (`_sd`) guided by 7.5 from precomputed embeddings. OMP_NUM_THREADS
sets the threads of both sides.
"""

import time
from collections.abc import Callable

import pytest
import torch

from bench import networks
from bench.networks import GUIDANCE, latents, scheduler, tokens
from streamaug.sampling.denoisers.base import LoadSettings
from streamaug.sampling.network import compiler
from streamaug.sampling.sampler import Sampler

STEPS = 20
ROUNDS = {("digits", 1): 31, ("digits", 64): 11, ("sd", 1): 11, ("sd", 8): 5}

cases = pytest.mark.parametrize(
    ("kind", "size"), ROUNDS, ids=[f"b{size}{'_sd' * (kind == 'sd')}" for kind, size in ROUNDS]
)


@pytest.fixture(autouse=True)
def _threads(benchmark):
    benchmark.extra_info["threads"] = torch.get_num_threads()


def sampler(kind: str, side: int = 8, dtype: torch.dtype = torch.float32, **settings: bool) -> Sampler:
    network = networks.build(kind, small=True, side=side).to(dtype)
    return Sampler(
        networks.denoiser(kind, network, LoadSettings(torch.device("cpu"), dtype, **settings)), scheduler(kind), STEPS
    )


def loop(kind: str, size: int) -> Callable[[], torch.Tensor]:
    return networks.loop(kind, networks.build(kind, small=True), latents(kind, size, small=True), STEPS, kind == "sd")


def ours(made: Sampler, kind: str, size: int) -> Callable[[], torch.Tensor]:
    return networks.ours(made, latents(kind, size, small=True), kind == "sd")


def pipeline(kind: str, size: int) -> Callable[[], object]:
    """The pipeline as diffusers' documentation calls it, without a decoder and a progress bar."""
    from diffusers import DDIMPipeline, StableDiffusionPipeline

    unet = networks.build(kind, small=True)
    if kind == "digits":
        pipe = DDIMPipeline(unet, scheduler(kind))
        pipe.set_progress_bar_config(disable=True)
        return lambda: pipe(batch_size=size, num_inference_steps=STEPS, output_type="np")
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipe = StableDiffusionPipeline(unet=unet, scheduler=scheduler(kind), **parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    null, prompt = tokens(unet.config.cross_attention_dim)[:, None].repeat(1, size, 1, 1)
    return lambda: pipe(
        prompt_embeds=prompt,
        negative_prompt_embeds=null,
        latents=latents(kind, size, small=True),
        guidance_scale=GUIDANCE,
        num_inference_steps=STEPS,
        output_type="latent",
    )


@cases
def test_same_math_ratio(alternate, benchmark, kind, size):
    """Both eager, both in torch's default layout."""
    mine, theirs = ours(sampler(kind, channels_last=False), kind, size), loop(kind, size)
    torch.testing.assert_close(mine(), theirs(), atol=1e-4, rtol=1e-4)
    seconds = alternate(rounds=ROUNDS[kind, size], calls=1, ours=mine, loop=theirs)
    record(benchmark, "same_math_ratio", kind, size, seconds["loop"] / seconds["ours"])


@cases
@pytest.mark.timeout(600)
@pytest.mark.skipif(compiler() is None, reason="torch.compile needs a C++ compiler")
def test_defaults_ratio(alternate, benchmark, kind, size):
    """Ours compiled and channels_last, as `compile: auto` runs where that pays."""
    mine = ours(sampler(kind, compile=True), kind, size)
    torch.testing.assert_close(first_call(benchmark, mine), loop(kind, size)(), atol=1e-3, rtol=1e-3)
    seconds = alternate(rounds=ROUNDS[kind, size], calls=1, ours=mine, pipeline=pipeline(kind, size))
    record(benchmark, "defaults_ratio", kind, size, seconds["pipeline"] / seconds["ours"])


@pytest.mark.timeout(600)
@pytest.mark.skipif(compiler() is None, reason="torch.compile needs a C++ compiler")
def test_defaults_ratio_bf16(alternate, benchmark):
    """The same with model.dtype: bfloat16, for processors that compute in it."""
    mine = ours(sampler("digits", dtype=torch.bfloat16, compile=True), "digits", 64)
    first_call(benchmark, mine)
    seconds = alternate(rounds=ROUNDS["digits", 64], calls=1, ours=mine, pipeline=pipeline("digits", 64))
    record(benchmark, "defaults_ratio_bf16", "digits", 64, seconds["pipeline"] / seconds["ours"])


def test_guided_over_unguided(alternate, benchmark):
    """A batch that is guided, beside one in which every scale is 1."""
    made, x = sampler("sd"), latents("sd", 4, small=True)
    plain, guided = networks.ours(made, x, False), networks.ours(made, x, True)
    seconds = alternate(rounds=5, calls=1, ours=plain, guided=guided)
    benchmark.extra_info["guided_over_unguided"] = seconds["guided"] / seconds["ours"]


def test_target_size_over_shrink(alternate, benchmark):
    """Sampling at 8x8, beside sampling at 32x32 and shrinking."""
    small = ours(sampler("digits"), "digits", 4)
    large = networks.ours(sampler("digits", side=32), torch.randn(4, 1, 32, 32), False)

    def shrunk() -> torch.Tensor:
        return torch.nn.functional.interpolate(large(), size=(8, 8), mode="area")

    seconds = alternate(rounds=5, calls=1, ours=small, shrunk=shrunk)
    benchmark.extra_info["target_size_over_shrink"] = seconds["shrunk"] / seconds["ours"]


def first_call(benchmark, mine: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What the first call returns; its time, which is that of compiling, is no part of the ratio."""
    began = time.perf_counter()
    found = mine()
    benchmark.extra_info["first_call_seconds"] = round(time.perf_counter() - began, 1)
    return found


def record(benchmark, name: str, kind: str, size: int, ratio: float) -> None:
    benchmark.extra_info[f"{name}_b{size}{'_sd' * (kind == 'sd')}"] = ratio

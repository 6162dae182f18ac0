"""The bank: inverting beside bare forwards of the same network, and gathering and mixing rows beside a plain copy."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from streamaug.kernels.perturb import perturb

from bench import networks
from streamaug.bank import Checkpoint
from streamaug.config import Config
from streamaug.inversion.methods import methods_for
from streamaug.sampling.denoisers import inspect

BATCH = 64
DIGITS, SD = (1, 8, 8), (4, 64, 64)
STEPS = 5


@pytest.fixture(autouse=True)
def _threads(benchmark):
    benchmark.extra_info["threads"] = torch.get_num_threads()


def inverter(folder: Path, method: str, **data: int):
    """The method for a model folder, as `streamaug invert` makes it."""
    config = Config.model_validate(
        {
            "data": data,
            "model": {"path": str(folder), "steps": STEPS, "device": "cpu"},
            "bank": {"methods": [method], "dtype": "float32"},
        }
    )
    [made] = methods_for(config, inspect(folder, config.data.image_size), None)
    return made


def invert_over_forward(alternate, benchmark, made, images: np.ndarray, bare, suffix: str) -> None:
    rows = np.arange(len(images))
    labels = np.zeros(len(images), np.int64)
    ours = partial(made.compute, images, labels, rows, Checkpoint(None))
    seconds = alternate(rounds=5, calls=1, ours=ours, bare=bare)
    benchmark.extra_info[f"invert_over_forward{suffix}"] = seconds["bare"] / seconds["ours"]


def test_ddim(alternate, benchmark, tmp_path):
    """The digits prior, 5 steps of 5 fixed-point iterations, beside as many bare forwards as that takes."""
    from diffusers import DDIMPipeline

    DDIMPipeline(networks.build("digits", small=True), networks.scheduler("digits")).save_pretrained(tmp_path)
    made = inverter(tmp_path, "ddim", image_size=8, channels=1)
    images = np.random.default_rng(0).integers(0, 256, (BATCH, *DIGITS), np.uint8)
    network = made._denoiser.network
    x = networks.latents("digits", BATCH, small=True).to(memory_format=torch.channels_last)

    @torch.no_grad()
    def bare() -> None:
        for _ in range(made.evaluations):
            network(x, 500, return_dict=False)

    invert_over_forward(alternate, benchmark, made, images, bare, "")


def test_encode(alternate, benchmark, tmp_path):
    """Stable Diffusion's autoencoder at an eighth of its width: encoding and the check, beside encoder and decoder."""
    from diffusers import AutoencoderKL, DiTPipeline

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=8,
    ).eval()
    DiTPipeline(networks.build("dit", small=True), vae, networks.scheduler("sd")).save_pretrained(tmp_path)
    made = inverter(tmp_path, "encode", image_size=64, channels=3)
    images = np.random.default_rng(0).integers(0, 256, (BATCH, 3, 64, 64), np.uint8)
    pixels = torch.from_numpy(images).float() / 127.5 - 1

    @torch.no_grad()
    def bare() -> None:
        vae.decode(vae.encode(pixels).latent_dist.mode())

    invert_over_forward(alternate, benchmark, made, images, bare, "_encode")


@pytest.mark.parametrize(
    ("suffix", "batch", "shape", "pairs", "dtype"),
    [
        ("", 8192, DIGITS, False, torch.float32),
        ("_pairs", 8192, DIGITS, True, torch.float32),
        ("_mapped", 8192, DIGITS, False, torch.float16),
        ("_b64", BATCH, DIGITS, False, torch.float32),
        ("_sd", BATCH, SD, False, torch.float32),
        ("_sd_pairs", BATCH, SD, True, torch.float32),
        ("_sd_mapped", BATCH, SD, False, torch.float16),
    ],
)
def test_perturb_over_copy(alternate, benchmark, suffix, batch, shape, pairs, dtype):
    """Noise weight 0, 2,048 rows: a bank in memory (fp32, `bank.device: memory`), and as it is stored (`_mapped`)."""
    rows, size = 2**11, torch.Size(shape).numel()
    bank = torch.randn(rows, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    ids, none = torch.arange(batch), torch.full((batch,), -1)
    weights = torch.tensor([[0.9, 0.0, 0.0]]).repeat(batch, 1)
    if pairs:
        weights[:, 1] = torch.linspace(0, 0.5, batch)
        weights[:, 0] = 1 - weights[:, 1]
    moved = (batch * size * bank.element_size() * (2 if pairs else 1) + batch * size * 4) // 2
    source, target = bank.view(-1).view(torch.uint8), torch.empty(moved, dtype=torch.uint8)
    if len(source) <= moved:
        source = torch.ones(moved + 1, dtype=torch.uint8)
    random = torch.Generator().manual_seed(1)

    def draw() -> torch.Tensor:
        return torch.randint(0, rows, (batch,), generator=random)

    draws = [(draw(), draw() if pairs else none) for _ in range(40)]
    turns = {"ours": 0, "copy": 0}

    def ours() -> None:
        turns["ours"] += 1
        row_a, row_b = draws[turns["ours"] % len(draws)]
        perturb(bank, row_a, row_b, weights, ids, seed=1)

    def copy() -> None:
        turns["copy"] += 1
        start = turns["copy"] * moved % (len(source) - moved)
        target.copy_(source[start : start + moved])

    seconds = alternate(rounds=101, calls=1 if batch > BATCH or shape == SD else 10, ours=ours, copy=copy)
    benchmark.extra_info[f"perturb_over_copy{suffix}"] = seconds["copy"] / seconds["ours"]

"""Where images start: gather an order batch's bank rows and mix them by the `perturb` kernel."""

import numpy as np
import torch

from streamaug.bank import LatentBank
from streamaug.errors import BankError
from streamaug.kernels.perturb import perturb
from streamaug.orders import INTERP_CIRCLE, INTERP_SPHERICAL, ORIGINS, OrderBatch

_LATENT_STREAM = 0
_CONDITIONING_STREAM = 16  # stream 1 is the solver's, 2 to 5 are for a cascade's second stage (`cascade`)


def start_latents(
    bank: LatentBank,
    order: OrderBatch,
    shape: tuple[int, ...],
    *,
    seed: int,
    device: torch.device,
    kernels: str,
) -> torch.Tensor:
    """The latents [B, *shape] fp32 at which the order's images enter the schedule."""
    rows, row_a, row_b = _gather(bank, ORIGINS[order.origin], order.images, shape)
    weights = mix_weights(order.images, rows, row_a, row_b)
    return _mix(rows, row_a, row_b, weights, order, _LATENT_STREAM, seed=seed, device=device, kernels=kernels)


def row_conditioning(
    bank: LatentBank, order: OrderBatch, *, seed: int, device: torch.device, kernels: str
) -> dict[str, torch.Tensor]:
    """The bank's inverted embeddings mixed by `cond_w`, by name, and "null.NAME" for each: [B, ...] fp32.

    The null is the mean of the group that row_a was inverted in, Diffusion Inversion's unconditional vector (Zhou et
    al. 2023). Empty unless the orders are conditioned on bank rows (template -1). Raises BankError for orders without
    anchors.
    """
    images = order.images
    found: dict[str, torch.Tensor] = {}
    if not (images["template"] < 0).all():
        return found
    for stream, name in enumerate(bank.tensors_of("embedding"), start=_CONDITIONING_STREAM):
        rows, row_a, row_b = _gather(bank, name, images, None)
        weights = images["cond_w"].astype(np.float32)
        found[name] = _mix(rows, row_a, row_b, weights, order, stream, seed=seed, device=device, kernels=kernels)
        found[f"null.{name}"] = bank.group_mean(name, images["row_a"]).to(device)
    return found


def _gather(
    bank: LatentBank, name: str, images: np.ndarray, shape: tuple[int, ...] | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The rows that the orders name, each once [n, ...], and where a and b are among them, int64 [B] (-1: none)."""
    used, inverse = np.unique(np.stack([images["row_a"], images["row_b"]]), return_inverse=True)
    inverse = inverse.reshape(2, -1)
    # np.unique sorts, so a missing row (-1) comes first: leave it out and let the others move down.
    missing = int(used[0] == -1)
    if len(used) == missing and shape is None:
        raise BankError("a recipe conditioned on inverted embeddings needs anchors: use 'noise' or 'interpolate'")
    rows = bank.gather(name, used[missing:]) if len(used) > missing else torch.zeros((1, *(shape or ())))
    row_a, row_b = (torch.from_numpy(part.astype(np.int64) - missing) for part in inverse)
    return rows, row_a, row_b


def _mix(
    rows: torch.Tensor,
    row_a: torch.Tensor,
    row_b: torch.Tensor,
    weights: np.ndarray,
    order: OrderBatch,
    stream: int,
    *,
    seed: int,
    device: torch.device,
    kernels: str,
) -> torch.Tensor:
    return perturb(
        rows.to(device),
        row_a.to(device),
        row_b.to(device),
        torch.from_numpy(weights).to(device),
        torch.from_numpy(order.images["id"].copy()).to(device),
        seed=seed,
        stream=stream,
        dtype=torch.float32,
        backend=kernels,
    )


def mix_weights(images: np.ndarray, rows: torch.Tensor, row_a: torch.Tensor, row_b: torch.Tensor) -> np.ndarray:
    """Weights of a, b and noise, fp32 [B, 3], with those of spherical and circle interpolation filled in.

    Spherical: sin((1-t)θ)/sin θ and sin(tθ)/sin θ. Circle: the same on the whole circle, u = 2πt/θ, as
    z = [sin((1+u)θ)·a − sin(uθ)·b] / sin θ. θ is measured in float64; near-parallel latents mix linearly.
    """
    weights = images["latent_w"].astype(np.float64)
    for position in np.flatnonzero(np.isin(images["interp"], (INTERP_SPHERICAL, INTERP_CIRCLE))):
        a = rows[row_a[position]].double().flatten()
        b = rows[row_b[position]].double().flatten()
        cosine = float(a @ b / (a.norm() * b.norm()).clamp(min=1e-30))
        angle, t, signal = (
            float(np.arccos(np.clip(cosine, -1.0, 1.0))),
            float(images["t"][position]),
            weights[position, 0],
        )
        sine = np.sin(angle)
        if abs(sine) < 1e-6:
            pair = (1 - t, t)
        elif images["interp"][position] == INTERP_SPHERICAL:
            pair = (np.sin((1 - t) * angle) / sine, np.sin(t * angle) / sine)
        else:
            turn = 2 * np.pi * t
            pair = (np.sin(angle + turn) / sine, -np.sin(turn) / sine)
        weights[position, :2] = signal * pair[0], signal * pair[1]
    return weights.astype(np.float32)

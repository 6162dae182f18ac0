"""Where images start: gather an order batch's bank rows and mix them by the `perturb` kernel."""

import numpy as np
import torch

from streamaug.kernels.perturb import perturb
from streamaug.orders import INTERP_CIRCLE, INTERP_SPHERICAL, ORIGINS, OrderBatch
from streamaug.sampling.residence import Rows

_LATENT_STREAM = 0
_CONDITIONING_STREAM = 16  # stream 1 is the solver's, 2 to 5 are for a cascade's second stage (`cascade`)


def start_latents(rows: Rows, order: OrderBatch, shape: tuple[int, ...], *, seed: int, kernels: str) -> torch.Tensor:
    """The latents [B, *shape] fp32 at which the order's images enter the schedule."""
    images = order.images
    anchored = images["latent_w"][:, :2].any()  # fresh noise reads no rows: the anchors are for the conditioning
    a, b = (images[name] if anchored else np.full(len(images), -1) for name in ("row_a", "row_b"))
    found, row_a, row_b = rows.gather(ORIGINS[order.origin], a, b, shape)
    weights = mix_weights(images, found, row_a, row_b)
    return _mix(found, row_a, row_b, weights, order, _LATENT_STREAM, seed, kernels)


def row_conditioning(rows: Rows, order: OrderBatch, *, seed: int, kernels: str) -> dict[str, torch.Tensor]:
    """The bank's inverted embeddings mixed by `cond_w`, by name, and with guidance "null.NAME": [B, ...] fp32.

    The null is the mean of the group that row_a was inverted in, Diffusion Inversion's unconditional vector (Zhou et
    al. 2023). Empty unless the orders are conditioned on bank rows (template -1). Raises BankError for orders without
    anchors.
    """
    images = order.images
    found: dict[str, torch.Tensor] = {}
    if not (images["template"] < 0).all():
        return found
    for stream, name in enumerate(rows.bank.tensors_of("embedding"), start=_CONDITIONING_STREAM):
        tensor, row_a, row_b = rows.gather(name, images["row_a"], images["row_b"])
        weights = images["cond_w"].astype(np.float32)
        found[name] = _mix(tensor, row_a, row_b, weights, order, stream, seed, kernels)
        if (images["guidance"] != 1.0).any():
            found[f"null.{name}"] = rows.bank.group_mean(name, images["row_a"]).to(rows.device)
    return found


def _mix(
    rows: torch.Tensor,
    row_a: torch.Tensor,
    row_b: torch.Tensor,
    weights: np.ndarray,
    order: OrderBatch,
    stream: int,
    seed: int,
    kernels: str,
) -> torch.Tensor:
    return perturb(
        rows,
        row_a,
        row_b,
        torch.from_numpy(weights).to(rows.device),
        torch.from_numpy(order.images["id"].copy()).to(rows.device),
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
    turning = np.isin(images["interp"], (INTERP_SPHERICAL, INTERP_CIRCLE))
    if not turning.any():
        return weights.astype(np.float32)
    at = torch.from_numpy(np.flatnonzero(turning)).to(rows.device)
    a, b = (rows[index[at]].double().flatten(1) for index in (row_a, row_b))
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-30)
    angle = np.arccos(np.clip(cosine.cpu().numpy(), -1.0, 1.0))
    t, interp, signal = images["t"][turning].astype(np.float64), images["interp"][turning], weights[turning, 0]
    turn = 2 * np.pi * t
    parallel = np.abs(np.sin(angle)) < 1e-6
    sine = np.where(parallel, 1.0, np.sin(angle))
    on_circle = interp == INTERP_CIRCLE
    first = np.where(on_circle, np.sin(angle + turn), np.sin((1 - t) * angle)) / sine
    second = np.where(on_circle, -np.sin(turn), np.sin(t * angle)) / sine
    weights[turning, 0] = signal * np.where(parallel, 1 - t, first)
    weights[turning, 1] = signal * np.where(parallel, t, second)
    return weights.astype(np.float32)

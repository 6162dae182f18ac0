"""Starting latents: gather an order batch's bank rows and mix them by the `perturb` kernel."""

import numpy as np
import torch

from streamaug.bank import LatentBank
from streamaug.kernels.perturb import perturb
from streamaug.orders import INTERP_CIRCLE, INTERP_SPHERICAL, OrderBatch

_PERTURB_STREAM = 0


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
    images = order.images
    used, inverse = np.unique(np.stack([images["row_a"], images["row_b"]]), return_inverse=True)
    inverse = inverse.reshape(2, -1)
    # np.unique sorts, so a missing row (-1) comes first: leave it out and let the others move down.
    missing = int(used[0] == -1)
    rows = bank.gather("latent", used[missing:]) if len(used) > missing else torch.zeros((1, *shape))
    row_a, row_b = (torch.from_numpy(part.astype(np.int64) - missing) for part in inverse)
    weights = torch.from_numpy(mix_weights(images, rows, row_a, row_b))
    return perturb(
        rows.to(device),
        row_a.to(device),
        row_b.to(device),
        weights.to(device),
        torch.from_numpy(images["id"].copy()).to(device),
        seed=seed,
        stream=_PERTURB_STREAM,
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

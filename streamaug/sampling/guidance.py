"""Guidance: classifier-free, and by a classifier's gradient (its rescaled form is the kernel `rescale`).

Classifier guidance moves the predicted clean image m0 (Bansal et al. 2023, "Universal Guidance") with the network's
output held fixed, so it costs one pass of the classifier and none of the denoiser. In the score's terms
(Dhariwal & Nichol 2021) the shift is Δm0 = scale · (noise / signal)² · ∇ log p(label | m0).
"""

import torch
from torch import nn


def combine(out: torch.Tensor, guidance: torch.Tensor) -> torch.Tensor:
    """Classifier-free guidance (Ho & Salimans 2022): [2B, ...], the unconditional half first, to [B, ...].

    guidance: the scales, fp32 [B] or [B, 1, 1, 1].
    """
    unconditional, conditional = out.chunk(2)
    return torch.lerp(unconditional, conditional, guidance.view(-1, *(1,) * (out.dim() - 1)).to(out.dtype))


def classifier_shift(
    classifier: nn.Module, m0: torch.Tensor, labels: torch.Tensor, scale: torch.Tensor, x0_scale: float
) -> torch.Tensor:
    """Δm0 [B, C, H, W] fp32 for predicted images m0 [B, C, H, W] in [-1, 1], labels int64 [B], scale fp32 [B]."""
    with torch.enable_grad():
        image = m0.detach().float().requires_grad_(True)
        log_p = torch.log_softmax(classifier(image).float(), dim=1)
        chosen = log_p.gather(1, labels[:, None]).sum()
        (gradient,) = torch.autograd.grad(chosen, image)
    return gradient * (scale * x0_scale).view(-1, 1, 1, 1)

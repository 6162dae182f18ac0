"""A loss in which synthetic images count for less, or more, than their share of the batch."""

import torch
import torch.nn.functional as F

from streamaug.errors import UsageError


def mixed_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    ids: torch.Tensor,
    *,
    synthetic_weight: float = 0.2,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """(1 − w) · mean cross-entropy of the real images + w · that of the synthetic ones; of one kind alone its mean.

    logits: [n, classes]; labels: int64 [n], or probabilities [n, classes]; ids: int64 [n] as `StreamLoader` yields them
    with `with_ids=True`, -1 for a real image; synthetic_weight: w in [0, 1]. The default is DataDream's (Kim et al.
    2024). Raises UsageError for another weight, or lengths that differ.
    """
    if not 0 <= synthetic_weight <= 1:
        raise UsageError(f"synthetic_weight {synthetic_weight}: expected a number in [0, 1]")
    if not len(logits) == len(labels) == len(ids):
        raise UsageError(f"{len(logits)} logits, {len(labels)} labels and {len(ids)} ids: expected as many of each")
    losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    synthetic = (ids >= 0).to(losses.device)
    share = synthetic.sum()
    if share == 0 or share == len(losses):
        return losses.mean()
    weights = torch.where(synthetic, synthetic_weight / share, (1 - synthetic_weight) / (len(losses) - share))
    return (weights * losses).sum()

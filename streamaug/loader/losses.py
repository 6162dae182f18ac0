"""A loss in which synthetic images count for less, or more, than their share of the batch."""

import torch
import torch.nn.functional as F

from streamaug.errors import UsageError


def mixed_weights(ids: torch.Tensor, synthetic_weight: float = 0.2) -> torch.Tensor:
    """The weight of each image in a loss: float32 [n], summing to 1, w of it on the synthetic images together.

        loss = (mixed_weights(ids, 0.2).to(losses.device) * losses).sum()     # losses [n], one of each image

    ids: int64 [n] as `StreamLoader` yields them with `with_ids=True`, -1 for a real image; synthetic_weight: w in
    [0, 1]. A batch of one kind alone has equal weights. The default is DataDream's (Kim et al. 2024). On the device of
    the ids: on the CPU, where StreamLoader leaves them, nothing waits for a GPU. Raises UsageError.
    """
    if not 0 <= synthetic_weight <= 1:
        raise UsageError(f"synthetic_weight {synthetic_weight}: expected a number in [0, 1]")
    count = len(ids)
    synthetic = ids >= 0
    share = int(synthetic.sum())
    if share in (0, count):
        return torch.full((count,), 1 / max(count, 1), device=ids.device)
    return torch.where(synthetic, synthetic_weight / share, (1 - synthetic_weight) / (count - share)).float()


def mixed_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    ids: torch.Tensor,
    *,
    synthetic_weight: float = 0.2,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """(1 − w) · mean cross-entropy of the real images + w · that of the synthetic ones; of one kind alone its mean.

    logits: [n, classes]; labels: int64 [n], or probabilities [n, classes]; ids and synthetic_weight as in
    `mixed_weights`. Raises UsageError for another weight, or lengths that differ.
    """
    if not len(logits) == len(labels) == len(ids):
        raise UsageError(f"{len(logits)} logits, {len(labels)} labels and {len(ids)} ids: expected as many of each")
    weights = mixed_weights(ids, synthetic_weight).to(logits.device, logits.dtype)
    losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    return (weights * losses).sum()

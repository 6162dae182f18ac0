"""The loss that weighs real and synthetic images apart."""

import pytest
import torch
import torch.nn.functional as F

from streamaug import mixed_cross_entropy
from streamaug.errors import UsageError
from streamaug.loader import mixed_weights

LOGITS = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
IDS = torch.tensor([-1, 7, -1, -1, 8, -1])


@pytest.mark.parametrize("soft", [False, True])
def test_real_and_synthetic_images_have_the_weight_that_is_given(soft):
    labels = F.one_hot(LABELS, 3).float() if soft else LABELS
    real, made = IDS < 0, IDS >= 0
    expected = 0.7 * F.cross_entropy(LOGITS[real], labels[real]) + 0.3 * F.cross_entropy(LOGITS[made], labels[made])
    torch.testing.assert_close(mixed_cross_entropy(LOGITS, labels, IDS, synthetic_weight=0.3), expected)


@pytest.mark.parametrize("ids", [torch.full((6,), -1), torch.arange(6)])
def test_of_one_kind_alone_it_is_the_mean(ids):
    found = mixed_cross_entropy(LOGITS, LABELS, ids, label_smoothing=0.1)
    torch.testing.assert_close(found, F.cross_entropy(LOGITS, LABELS, label_smoothing=0.1))


@pytest.mark.parametrize(("weight", "ids"), [(1.5, IDS), (-0.1, IDS), (0.5, IDS[:3])])
def test_what_cannot_be_meant_is_refused(weight, ids):
    with pytest.raises(UsageError, match=r"expected"):
        mixed_cross_entropy(LOGITS, LABELS, ids, synthetic_weight=weight)


def test_the_weights_serve_any_loss_of_single_images():
    weights = mixed_weights(IDS, 0.3)
    assert weights.dtype == torch.float32 and float(weights.sum()) == pytest.approx(1)
    assert float(weights[IDS >= 0].sum()) == pytest.approx(0.3)
    losses = F.cross_entropy(LOGITS, LABELS, reduction="none")
    torch.testing.assert_close((weights * losses).sum(), mixed_cross_entropy(LOGITS, LABELS, IDS, synthetic_weight=0.3))
    assert mixed_weights(torch.full((4,), -1)).tolist() == [0.25] * 4


def test_the_loss_is_that_of_half_precision_logits_and_has_a_gradient():
    logits = LOGITS.bfloat16().requires_grad_()
    loss = mixed_cross_entropy(logits, LABELS, IDS)
    loss.backward()
    assert loss.dtype == torch.bfloat16 and logits.grad.abs().sum() > 0

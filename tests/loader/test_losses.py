"""The loss that weighs real and synthetic images apart."""

import pytest
import torch
import torch.nn.functional as F

from streamaug import mixed_cross_entropy
from streamaug.errors import UsageError

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

"""Starting latents: the mixing weights against their formulas, and the bank's rows against a plain loop."""

import numpy as np
import pytest
import torch
from streamaug.kernels.philox import normal

from streamaug.errors import BankError
from streamaug.orders import INTERP_CIRCLE, INTERP_LINEAR, INTERP_SPHERICAL, ORDER_DTYPE, OrderBatch
from streamaug.sampling.latents import mix_weights, row_conditioning, start_latents
from streamaug.sampling.residence import Rows

CPU = torch.device("cpu")
ROWS = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def order(interp, t, latent_w, row_a=0, row_b=1):
    images = np.zeros(1, ORDER_DTYPE)
    images["row_a"], images["row_b"], images["interp"], images["t"] = row_a, row_b, interp, t
    images["latent_w"] = latent_w
    return images


def weights(interp, t, latent_w=(1.0, 0.0, 0.0), rows=ROWS):
    return mix_weights(order(interp, t, latent_w), rows, torch.tensor([0]), torch.tensor([1]))[0]


@pytest.mark.parametrize("interp", [INTERP_SPHERICAL, INTERP_CIRCLE])
@pytest.mark.parametrize("t", [0.1, 0.37, 0.8])
def test_rotations_keep_the_norm_of_unit_latents(interp, t):
    unit = ROWS / ROWS.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    a, b, noise = weights(interp, t, rows=unit)
    assert noise == 0
    assert (a * unit[0] + b * unit[1]).norm().item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("t", [0.0, 0.25, 1.0])
def test_spherical_turns_by_its_share_of_the_angle_and_scales_with_the_signal(t):
    unit = ROWS / ROWS.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    angle = np.arccos(float((unit[0] * unit[1]).sum()))
    a, b, noise = weights(INTERP_SPHERICAL, t, (0.6, 0.0, 0.8), unit)
    mixed = a * unit[0] + b * unit[1]
    assert float((mixed * unit[0]).sum()) == pytest.approx(0.6 * np.cos(t * angle), abs=1e-5)
    assert noise == pytest.approx(0.8)


def test_a_whole_turn_of_the_circle_comes_back_to_the_anchor():
    np.testing.assert_allclose(weights(INTERP_CIRCLE, 1.0)[:2], weights(INTERP_CIRCLE, 0.0)[:2], atol=1e-6)
    np.testing.assert_allclose(weights(INTERP_CIRCLE, 0.0)[:2], (1, 0), atol=1e-6)


def test_parallel_latents_mix_linearly():
    np.testing.assert_allclose(weights(INTERP_SPHERICAL, 0.3, rows=ROWS[[0, 0]])[:2], (0.7, 0.3), atol=1e-6)


def test_linear_weights_are_the_orders_own():
    np.testing.assert_allclose(weights(INTERP_LINEAR, 0.9, (0.5, 0.25, 0.1)), (0.5, 0.25, 0.1), atol=1e-7)


class Bank:
    def gather(self, name, rows):
        assert name == "latent"
        return ROWS[torch.as_tensor(rows)]


@pytest.mark.parametrize(("row_a", "row_b"), [(2, 0), (1, -1), (-1, -1)])
def test_missing_rows_add_nothing(row_a, row_b):
    images = order(INTERP_LINEAR, 0.5, (0.5, 0.25, 0.0), row_a, row_b)
    made = start_latents(Rows(Bank(), CPU), OrderBatch(0, 0, 0, 0, images), (1, 4, 4), seed=0, kernels="auto")
    expected = sum((w * ROWS[row] for w, row in ((0.5, row_a), (0.25, row_b)) if row >= 0), torch.zeros(1, 4, 4))
    torch.testing.assert_close(made[0], expected)


class EmbeddingBank:
    """Six rows inverted in groups of four."""

    rows = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))

    def tensors_of(self, part):
        return ["class_embedding"] if part == "embedding" else []

    def gather(self, name, rows):
        return self.rows[torch.as_tensor(rows)]

    def group_mean(self, name, rows):
        means = torch.stack([self.rows[:4].mean(0), self.rows[4:].mean(0)])
        return means[torch.as_tensor(rows) // 4]


def test_the_conditioning_mixes_two_rows_and_noise_and_its_null_is_the_mean_of_the_groups():
    images = np.zeros(3, ORDER_DTYPE)
    images["id"] = [5, 6, 7]
    images["template"], images["row_a"], images["row_b"] = -1, [0, 5, 4], [1, 4, 4]
    images["cond_w"] = [(0.9, 0.1, 0.0), (1.0, 0.0, 0.0), (1.0, 0.0, 0.1)]
    given = {"seed": 3, "kernels": "torch"}
    bank, order = EmbeddingBank(), OrderBatch(0, 0, 0, 0, images)
    found = row_conditioning(Rows(bank, CPU), order, **given)
    assert found.keys() == {"class_embedding", "null.class_embedding"}
    noise = normal(torch.tensor([7]), (3,), seed=3, stream=16)[0]
    expected = [0.9 * bank.rows[0] + 0.1 * bank.rows[1], bank.rows[5], bank.rows[4] + 0.1 * noise]
    torch.testing.assert_close(found["class_embedding"], torch.stack(expected))
    torch.testing.assert_close(found["null.class_embedding"], bank.group_mean("", np.array([0, 5, 4])))


def test_orders_by_label_need_no_rows():
    given = {"seed": 0, "kernels": "torch"}
    assert row_conditioning(Rows(EmbeddingBank(), CPU), OrderBatch(0, 0, 0, 0, np.zeros(2, ORDER_DTYPE)), **given) == {}


def test_orders_on_rows_without_an_anchor_are_refused():
    images = np.zeros(2, ORDER_DTYPE)
    images["template"] = images["row_a"] = images["row_b"] = -1
    given = {"seed": 0, "kernels": "torch"}
    with pytest.raises(BankError, match="needs anchors"):
        row_conditioning(Rows(EmbeddingBank(), CPU), OrderBatch(0, 0, 0, 0, images), **given)

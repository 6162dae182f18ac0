"""Where the bank is kept changes how fast rows come, not which."""

import hashlib

import numpy as np
import pytest
import torch

from streamaug.bank import BankPlan, BankWriter, LatentBank, Part
from streamaug.config import Recipe
from streamaug.errors import BankError, ConfigError
from streamaug.orders import Planner, Schedule
from streamaug.sampling import residence
from streamaug.sampling.latents import start_latents
from streamaug.sampling.residence import Rows, decide

CPU = torch.device("cpu")
ROWS, SHAPE = 23, (2, 4, 4)


@pytest.fixture(scope="module")
def bank(tmp_path_factory) -> LatentBank:
    plan = BankPlan(
        labels=np.arange(ROWS) % 3,
        source_hashes=[hashlib.sha256(bytes([row])).hexdigest() for row in range(ROWS)],
        source_names=[f"{row}.png" for row in range(ROWS)],
        class_names=["a", "b", "c"],
        meta={"image_shape": [2, 4, 4], "model": "m"},
        parts=[Part("encode", {}, group_rows=4)],
        shard_rows=8,
    )
    random = torch.Generator().manual_seed(0)
    with BankWriter(tmp_path_factory.mktemp("bank") / "bank", plan) as writer:
        for group in writer.pending("encode"):
            writer.put("encode", group, {"latent": torch.randn(len(group.rows), *SHAPE, generator=random)})
        return writer.finish()


@pytest.mark.parametrize("kind", ["noise", "interpolate", "prompt"])
def test_a_bank_in_memory_starts_images_where_a_mapped_one_does(bank, kind):
    schedule = Schedule(np.linspace(0, 1, 5), np.linspace(1, 0, 5))
    plan = Planner(bank.labels, 3, schedule, [Recipe(kind=kind)], 16, 0)
    for k in range(5):
        order = plan.batch(k, plan.uniform())
        mapped, kept = (
            start_latents(Rows(bank, CPU, where), order, SHAPE, seed=1, kernels="auto")
            for where in ("mapped", "memory")
        )
        torch.testing.assert_close(kept, mapped, atol=1e-6, rtol=0)


def test_a_row_the_bank_has_not_is_refused_wherever_it_is_kept(bank):
    for where in ("mapped", "memory"):
        with pytest.raises(BankError, match=str(ROWS)):
            Rows(bank, CPU, where).gather("latent", np.array([0, ROWS]), np.array([-1, -1]), SHAPE)


def test_auto_keeps_a_small_bank_in_memory_and_says_its_size(bank, caplog):
    with caplog.at_level("INFO", logger="streamaug"):
        assert decide("auto", bank, ["latent"], CPU) == "memory"
    assert "23 rows" in caplog.text and "in memory" in caplog.text


def test_auto_maps_a_bank_that_is_large(bank, monkeypatch):
    monkeypatch.setattr(residence, "_MEMORY_BYTES", 4 * ROWS * 32 - 1)
    assert decide("auto", bank, ["latent"], CPU) == "mapped"
    assert decide("memory", bank, ["latent"], CPU) == "memory"


def test_only_tensors_that_recipes_use_count(bank, monkeypatch):
    monkeypatch.setattr(residence, "_MEMORY_BYTES", 0)
    assert decide("auto", bank, [], CPU) == "memory"


def test_a_gpu_that_is_not_there_is_refused(bank):
    with pytest.raises(ConfigError, match=r"bank\.device is cuda"):
        decide("cuda", bank, ["latent"], CPU)

"""Pictures of first batches go to a folder of the test's own, and what is drawn at random is the same in every run."""

import random

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def picture_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("STREAMAUG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "first_batches"


@pytest.fixture(autouse=True)
def seeded():
    """Whichever tests came before in this process."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)

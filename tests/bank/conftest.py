"""Fixtures: an uninterrupted bank, and copies of it to be damaged."""

import shutil
from pathlib import Path

import pytest

from streamaug.bank import BankPlan, LatentBank

from .banks import contents, make_plan, write


@pytest.fixture(scope="package")
def expected(tmp_path_factory) -> tuple[BankPlan, dict[str, bytes], LatentBank]:
    """An uninterrupted bank: its plan, its bytes, and itself."""
    path = tmp_path_factory.mktemp("bank") / "bank"
    plan = make_plan()
    bank = write(path, plan)
    return plan, contents(path), bank


@pytest.fixture
def copy(expected, tmp_path) -> Path:
    """A copy of the uninterrupted bank."""
    return shutil.copytree(expected[2].path, tmp_path / "bank")

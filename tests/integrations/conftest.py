"""Frameworks talk much; what they say is not what is tested."""

import logging

import pytest


@pytest.fixture(autouse=True)
def quiet():
    for name in ("lightning.pytorch", "pytorch_lightning", "transformers", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)

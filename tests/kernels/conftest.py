"""Every kernel test runs the reference and the Triton kernel: on a GPU if there is one, else interpreted."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported

from streamaug.kernels._backend import triton_available

BACKENDS = ["torch", "triton"] if triton_available() else ["torch"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def device(backend: str) -> str:
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"

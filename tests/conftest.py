"""Every test runs offline, on as many threads as `make test` leaves to it."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once

import pytest
import torch

torch.set_num_threads(min(2, int(os.environ.get("OMP_NUM_THREADS", "2"))))


@pytest.fixture
def small_pipe():
    """A small random Stable Diffusion pipeline of the test's own; see `tests.small`."""
    from tests.small import new_small_pipe

    return new_small_pipe()

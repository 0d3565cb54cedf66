"""Every test runs offline, on as many threads as `make test` leaves to it, and keeps its latents to itself."""

import atexit
import os
import shutil
import socket
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once
# Of this process, and of those that its tests start.
os.environ["SAFEPATCH_CACHE"] = tempfile.mkdtemp(prefix="safepatch-tests-")

import pytest
import torch

atexit.register(shutil.rmtree, os.environ["SAFEPATCH_CACHE"], ignore_errors=True)
torch.set_num_threads(min(2, int(os.environ.get("OMP_NUM_THREADS", "2"))))


@pytest.fixture
def small_pipe():
    """A small random Stable Diffusion pipeline of the test's own; see `tests.small`."""
    from tests.small import new_small_pipe

    return new_small_pipe()


@pytest.fixture
def closed_sockets(monkeypatch) -> list[object]:
    """No connection can be made, and the Hub's own offline switch is off; attempts are listed."""
    attempts: list[object] = []

    def refuse(*args: object, **_: object) -> None:
        attempts.append(args)
        raise OSError("closed for the test")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return attempts

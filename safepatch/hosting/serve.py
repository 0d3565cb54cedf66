"""`safepatch serve`: the port is taken first, then the model is loaded and patched, and only then anything answered."""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safepatch.artifact.container import read_header
from safepatch.diffusion import quiet
from safepatch.errors import ConfigError
from safepatch.hosting.limits import Keys, Limits
from safepatch.hosting.worker import Worker
from safepatch.runtime.apply import apply

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PACKAGES = ("fastapi", "uvicorn", "prometheus_client")


@contextmanager
def listening(host: str, port: int, keys: Keys) -> Iterator[socket.socket]:
    """A socket that is ours, before gigabytes of weights are read.

    Raises:
        ConfigError: where a package is missing, the port is not free, or others could ask without a key.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ConfigError("a server needs packages: pip install 'safepatch-diffusion[serve]'")
    if host not in LOOPBACK and not keys:
        raise ConfigError(f"anybody who reaches {host} could ask; give --keys FILE, or serve on 127.0.0.1")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as ours:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            ours.bind((host, port))
            ours.listen()
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or error
            raise ConfigError(f"cannot serve on {host}:{port} ({why}); choose another --port") from None
        yield ours


def serve(
    ours: socket.socket,
    load: Callable[[], Any],
    patch: Path,
    keys: Keys,
    limits: Limits,
    batch: int = 4,
    waiting: int = 64,
) -> None:
    """Answer until told to stop.

    Args:
        ours: of `listening`.
        load: makes the pipeline, which nobody else draws with.
        patch: without which nothing is answered.
        keys: of those who may ask.
        limits: of what they may.
        batch: images drawn at once.
        waiting: images that may wait.

    Raises:
        SafepatchError: when the patch cannot be applied.
    """
    import uvicorn

    from safepatch.hosting.service import create_app

    if batch < 1 or waiting < 1:
        raise ConfigError(f"--batch and --waiting must be at least 1, not {batch} and {waiting}")
    pipe = quiet(load())
    with apply(pipe, patch) as handle, Worker(pipe, handle, batch, waiting) as worker:
        worker.require_patched()
        app = create_app(worker, read_header(patch).stated_hash, keys, limits)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[ours])

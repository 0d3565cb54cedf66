"""`safepatch serve`: the port is taken first, then the model is loaded and patched, and only then anything answered."""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safepatch.diffusion import quiet
from safepatch.errors import ConfigError, lookup
from safepatch.guard.decide import ACTIONS, BLOCK, lacking
from safepatch.guard.file import Guard
from safepatch.hosting.limits import Keys, Limits
from safepatch.hosting.stamp import Receipts, Stamp
from safepatch.hosting.worker import Worker
from safepatch.progress import note
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


@dataclass(frozen=True)
class Service:
    """What is served, and how.

    Attributes:
        patch: without which nothing is answered.
        limits: of what may be asked.
        batch: images drawn at once.
        waiting: images that may wait.
        guard: a guard's file, if one judges prompts beforehand.
        guard_action: `block`, `rewrite` or `score`.
        stamp: how receipts are made, if images carry any.

    Raises:
        ConfigError: for a number below 1.
        UnknownName: for another action.
        ArtifactError: for a file that is no guard.
    """

    patch: Path
    limits: Limits
    batch: int = 4
    waiting: int = 64
    guard: Path | None = None
    guard_action: str = BLOCK
    stamp: Stamp | None = None

    def __post_init__(self) -> None:
        """Nonsense cannot be constructed."""
        if self.batch < 1 or self.waiting < 1:
            raise ConfigError(f"--batch and --waiting must be at least 1, not {self.batch} and {self.waiting}")
        lookup(dict.fromkeys(ACTIONS), self.guard_action, what="action of a guard")
        if self.guard:
            Guard.open(self.guard)  # what is wrong with it is told before gigabytes of weights are read


def serve(ours: socket.socket, load: Callable[[], Any], keys: Keys, service: Service) -> None:
    """Answer until told to stop.

    Args:
        ours: of `listening`.
        load: makes the pipeline, which nobody else draws with.
        keys: of those who may ask.
        service: what they are served.

    Raises:
        SafepatchError: when the patch cannot be applied, or the guard cannot read.
    """
    import uvicorn

    with serving(load(), keys, service) as app:
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[ours])


@contextmanager
def serving(pipe: Any, keys: Keys, service: Service) -> Iterator[Any]:
    """The application, with the patch on `pipe`, which nobody else draws with, and a worker that draws."""
    from safepatch.hosting.door import Door
    from safepatch.hosting.service import create_app

    quiet(pipe)
    door = Door.opened(service.guard, service.guard_action, pipe) if service.guard else None  # before it is patched
    with apply(pipe, service.patch) as handle, Worker(pipe, handle, service.batch, service.waiting) as worker:
        worker.require_patched()
        for line in lacking(door.guard.categories, handle.categories) if door else ():
            note(line)
        guard = door.describe() if door else None
        receipts = Receipts(service.stamp, pipe, handle, guard) if service.stamp else None
        yield create_app(worker, handle.content_hash, keys, service.limits, door, receipts)

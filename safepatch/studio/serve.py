"""`safepatch studio`: the port is taken, then the page is there; the model is opened when it is first drawn with."""

import socket
from importlib.util import find_spec

from safepatch.errors import ConfigError
from safepatch.hosting.limits import Keys
from safepatch.hosting.serve import LOOPBACK, PACKAGES
from safepatch.studio.desk import Desk


def require_packages() -> None:
    """Raise `ConfigError` where the extra is missing."""
    if any(find_spec(name) is None for name in PACKAGES):
        raise ConfigError("the studio needs packages: pip install 'safepatch-diffusion[studio]'")


def serve(ours: socket.socket, desk: Desk, keys: Keys, host: str = "127.0.0.1") -> None:
    """Show the page until told to stop.

    Args:
        ours: of `hosting.serve.listening`.
        desk: where pictures are asked for.
        keys: of those who may ask.
        host: that it is served on; on this machine's own address no other name is answered.
    """
    import uvicorn

    from safepatch.studio.jobs import Jobs
    from safepatch.studio.service import create_app

    hosts = ("127.0.0.1", "localhost", "::1", "[::1]") if host in LOOPBACK else ("*",)
    with Jobs() as jobs:
        app = create_app(desk, jobs, keys, hosts)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[ours])

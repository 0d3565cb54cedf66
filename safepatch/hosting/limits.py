"""What a server lets be asked, and of whom: limits, keys, and bodies that end."""

import asyncio
import hmac
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safepatch.errors import ConfigError

KEYS = "SAFEPATCH_API_KEYS"  # environment variable: keys separated by commas
SHORTEST = 16  # characters of a key

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


@dataclass(frozen=True)
class Limits:
    """What may be asked of a server.

    Attributes:
        timeout: seconds that a request may take, and its body to arrive.
        body: bytes of a request.
        prompt: characters of a prompt.
        steps: of denoising.
        edge: pixels of a picture's side.
        images: of one request.
        least_scale: strength of the patch that a request may choose, up to 1; None lets none choose.

    Raises:
        ConfigError: for one below 1, or a strength that is not within (0, 1].
    """

    timeout: float = 120.0
    body: int = 1 << 16
    prompt: int = 4000
    steps: int = 100
    edge: int = 1024
    images: int = 4
    least_scale: float | None = None

    def __post_init__(self) -> None:
        """Nonsense cannot be constructed."""
        if self.least_scale is not None and not 0 < self.least_scale <= 1:
            raise ConfigError(f"a strength that may be asked for is within (0, 1], not {self.least_scale:g}")
        for name, value in vars(self).items():
            if name != "least_scale" and not value >= 1:
                raise ConfigError(f"the limit of {name} must be at least 1, not {value}")


class Keys:
    """Who may ask; without any key everybody may.

    Args:
        known: keys.

    Raises:
        ConfigError: for a key that is easily guessed.
    """

    def __init__(self, known: Sequence[str] = ()) -> None:
        if any(len(key) < SHORTEST for key in known):
            raise ConfigError(f"an API key has fewer than {SHORTEST} characters; take longer ones")
        self._known = [key.encode() for key in known]

    @classmethod
    def of(cls, path: Path | None) -> "Keys":
        """Those in a file, one a line, and in the environment variable SAFEPATCH_API_KEYS."""
        try:
            lines = [] if path is None else path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read API keys from {path} ({error}); write one a line") from None
        given = [*lines, *os.environ.get(KEYS, "").split(",")]
        keys = cls([key.strip() for key in given if key.strip() and not key.startswith("#")])
        if path is not None and not keys:
            raise ConfigError(f"{path} holds no API key; write one a line")
        return keys

    def __bool__(self) -> bool:
        """Whether a key is asked for."""
        return bool(self._known)

    def let(self, authorization: str) -> bool:
        """Whether a request with this `Authorization` header may pass."""
        scheme, _, given = authorization.partition(" ")
        matches = [hmac.compare_digest(key, given.strip().encode()) for key in self._known]  # all, in equal time
        return not self._known or (scheme.lower() == "bearer" and any(matches))


class WholeBodies:
    """ASGI middleware: a request is handed on once its body is whole, if it is small and arrives in time.

    Args:
        app: that is handed the requests.
        limits: of the server.
    """

    def __init__(self, app: Any, limits: Limits) -> None:
        self._app, self._limits = app, limits

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(self._body(scope, receive), self._limits.timeout)
        except TimeoutError:
            await _refuse(send, 408, "the request's body did not arrive in time")
            return
        if body is None:
            await _refuse(send, 413, f"a request may have {self._limits.body} bytes at most")
            return
        given = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return given.pop() if given else await receive()

        await self._app(scope, again, send)

    async def _body(self, scope: MutableMapping[str, Any], receive: Receive) -> bytes | None:
        """All of it; None of one that is too large."""
        stated = dict(scope["headers"]).get(b"content-length", b"0")
        if stated.isdigit() and int(stated) > self._limits.body:
            return None
        body, is_more = b"", True
        while is_more:
            message = await receive()
            body += message.get("body", b"")
            is_more = message.get("more_body", False)
            if len(body) > self._limits.body:
                return None
        return body


def error_body(message: str, kind: str) -> dict[str, dict[str, str]]:
    """What an answer that refuses says, in the shape that clients of OpenAI's API expect."""
    return {"error": {"message": message, "type": kind}}


async def _refuse(send: Send, code: int, message: str) -> None:
    body = json.dumps(error_body(message, "invalid_request_error")).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": code, "headers": headers})
    await send({"type": "http.response.body", "body": body})

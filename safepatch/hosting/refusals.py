"""What a server answers to whatever goes wrong: a code and one sentence, in the shape that OpenAI's clients expect."""

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from safepatch.errors import PatchBypassed, PromptBlocked, PromptError, printable
from safepatch.hosting.door import Unjudged
from safepatch.hosting.limits import error_body
from safepatch.hosting.worker import Overloaded

KINDS = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 503: "overloaded_error"}
POLICY = "content_policy_violation"  # OpenAI's code of a prompt that is refused
LATER = 60  # seconds after which somebody may have seen to it


def refused(status: int, message: str, retry_after: int | None = None, **more: Any) -> JSONResponse:
    """An answer without an image; `more` stands beside its message."""
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    body = error_body(printable(message), KINDS.get(status, "server_error"))
    return JSONResponse({"error": body["error"] | more}, status, headers)


def add_refusals(app: FastAPI) -> None:
    """Let an application answer so."""

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:] if not isinstance(part, int))
        return refused(400, f"{place or 'the body'}: {first['msg']}")

    @app.exception_handler(HTTPException)
    async def told(_: Request, error: HTTPException) -> Response:
        return refused(error.status_code, str(error.detail))

    @app.exception_handler(PromptError)
    async def unfit(_: Request, error: PromptError) -> Response:
        return refused(400, str(error))

    @app.exception_handler(PromptBlocked)
    async def blocked(_: Request, error: PromptBlocked) -> Response:
        return refused(400, str(error), code=POLICY, category=error.category)

    @app.exception_handler(Unjudged)
    async def unjudged(_: Request, error: Unjudged) -> Response:
        return refused(503, str(error), LATER)

    @app.exception_handler(Overloaded)
    async def overloaded(_: Request, error: Overloaded) -> Response:
        return refused(503, str(error), error.seconds)

    @app.exception_handler(PatchBypassed)
    async def bypassed(_: Request, error: PatchBypassed) -> Response:
        return refused(503, f"no image: {error}", LATER)

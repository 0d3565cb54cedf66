"""The page's HTTP side: settings arrive as an address would hold them; what takes long is lined up and looked in on.

Only the page itself may ask: other pages that a browser has open cannot send its header, and other names than those
that are served are not answered.
"""

import base64
import secrets
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

from safepatch.errors import SafepatchError, UnknownName, lookup
from safepatch.hosting.limits import Keys, Limits, WholeBodies, error_body
from safepatch.studio import page as pages
from safepatch.studio.chosen import offered
from safepatch.studio.desk import Desk
from safepatch.studio.jobs import Busy, Jobs
from safepatch.studio.settings import Settings

Next = Callable[[Request], Awaitable[Response]]
HEADER = "x-safepatch"  # no other page can send it without being asked first, and it is never allowed
POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'nonce-{}'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

# What each button comes to, as HTML.
WORK: dict[str, Callable[[Desk, Settings], str]] = {
    "draw": lambda desk, settings: pages.pairs(desk.draw(settings), settings),
    "attack": lambda desk, settings: pages.attacked(desk.attack(settings), settings, desk),
    "merge": lambda desk, settings: pages.merged(desk.merge(settings, is_kept=False), settings),
    "keep": lambda desk, settings: pages.merged(desk.merge(settings, is_kept=True), settings),
}


def create_app(desk: Desk, jobs: Jobs, keys: Keys, hosts: Sequence[str] = ("*",)) -> FastAPI:
    """The application; `jobs` run as long as whoever made them lets them.

    Args:
        desk: where pictures are asked for.
        jobs: the line.
        keys: as passwords of those who may ask, under any name; without any everybody may who reaches it.
        hosts: names that it is reached by.
    """
    app = FastAPI(title="safepatch studio", docs_url=None, redoc_url=None, openapi_url=None)
    app.middleware("http")(_doorman(keys))
    app.add_middleware(WholeBodies, limits=Limits())
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))

    @app.exception_handler(SafepatchError)
    async def told(_: Request, error: SafepatchError) -> Response:
        return _refused({UnknownName: 404, Busy: 503}.get(type(error), 400), str(error))

    @app.get("/")
    def whole(request: Request) -> Response:
        nonce, message, settings = secrets.token_urlsafe(16), "", desk.start
        if request.url.query:
            try:
                settings = Settings.from_query(request.url.query)
            except SafepatchError as error:
                message = f"this link does not hold: {error}"
        text = pages.page(desk, settings, offered(desk.start.patches), nonce, message)
        return HTMLResponse(text, headers={"Content-Security-Policy": POLICY.format(nonce)})

    @app.post("/set")
    async def settle(request: Request) -> dict[str, str]:
        settings = await _settings(request)
        known, query = desk.sliders(settings), settings.to_query()
        names = " ".join(name for each in known for name in each.categories)
        parts = {"sliders": pages.sliders(known), "commands": pages.lines(desk.commands(settings))}
        return {"link": f"?{query}" if query else "", "names": names, **parts}

    @app.post("/ask/{verb}")
    async def ask(verb: str, request: Request) -> dict[str, int]:
        work, settings = lookup(WORK, verb, what="button"), await _settings(request)
        return {"job": jobs.submit(lambda: work(desk, settings))}

    @app.get("/jobs/{number}")
    def job(number: int) -> dict[str, Any]:
        state = jobs.state(number)
        return {"stage": state.stage, "text": state.text, "share": state.share, "html": state.html}

    @app.delete("/jobs/{number}")
    def stop(number: int) -> dict[str, Any]:
        jobs.stop(number)
        return {}

    return app


async def _settings(request: Request) -> Settings:
    """Of the body, which is an address's query; raises `SafepatchError` for nonsense."""
    return Settings.from_query((await request.body()).decode("utf-8", "replace"))


def _doorman(keys: Keys) -> Callable[[Request, Next], Awaitable[Response]]:
    async def let(request: Request, go_on: Next) -> Response:
        if not keys.let(f"Bearer {_password(request.headers.get('authorization', ''))}"):
            answer = _refused(401, "no or no valid key; give it as the password")
            answer.headers["WWW-Authenticate"] = 'Basic realm="safepatch studio"'
            return answer
        if request.method != "GET" and HEADER not in request.headers:
            return _refused(403, "only the studio's own page may ask")
        answer = await go_on(request)
        answer.headers.update({"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"})
        answer.headers["Referrer-Policy"] = "no-referrer"
        return answer

    return let


def _password(authorization: str) -> str:
    """Of HTTP's basic authentication; empty where there is none."""
    scheme, _, given = authorization.partition(" ")
    if scheme.lower() != "basic":
        return ""
    try:
        return base64.b64decode(given, validate=True).decode().partition(":")[2]
    except ValueError:
        return ""


def _refused(code: int, message: str) -> JSONResponse:
    return JSONResponse(error_body(message, "invalid_request_error"), code)

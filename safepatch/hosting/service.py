"""The server's HTTP side: what is asked is checked, lined up for the worker, and answered, or refused in one sentence.

No answer holds an image that was drawn without the patch: see `worker`.
"""

import base64
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from safepatch.diffusion import as_picture
from safepatch.hosting.desk import GRID, Ask, AskLikeOpenAI, Desk, Done
from safepatch.hosting.door import Door
from safepatch.hosting.limits import Keys, Limits, WholeBodies
from safepatch.hosting.metrics import MEDIA_TYPE, Metrics
from safepatch.hosting.refusals import add_refusals, refused
from safepatch.hosting.stamp import Receipts, png
from safepatch.hosting.worker import Worker
from safepatch.runtime.check import status

LOG = logging.getLogger(__name__)
OPEN = ("/status", "/metrics")  # paths for which no key is asked: they tell nothing of any prompt


def create_app(
    worker: Worker,
    content_hash: str,
    keys: Keys,
    limits: Limits | None = None,
    door: Door | None = None,
    receipts: Receipts | None = None,
) -> FastAPI:
    """The application; the worker runs as long as whoever made it lets it.

    Args:
        worker: that draws, with a patch.
        content_hash: of the patch.
        keys: of those who may ask.
        limits: of what they may.
        door: a guard that judges prompts before anything is drawn, if any.
        receipts: that images carry, if they do.
    """
    limits, metrics = limits or Limits(), Metrics()
    worker.watch = metrics.watch
    app, desk = FastAPI(title="safepatch", docs_url=None, redoc_url=None), Desk(worker, limits, metrics, door)
    add_refusals(app)
    app.middleware("http")(_doorman(keys, metrics))
    app.add_middleware(WholeBodies, limits=limits)

    @app.post("/generate")
    async def generate(ask: Ask) -> dict[str, Any]:
        (done,) = await desk.draw(ask)
        acted = done.answer.drawn.acted
        did = {"identical_to_base": not acted, "acted_steps": acted, "opened": desk.opened(done.answer)}
        return {"image": await _encoded(done, receipts), "seed": done.job.seed, **did, **done.judged()}

    @app.post("/v1/images/generations")
    async def generations(ask: AskLikeOpenAI) -> dict[str, Any]:
        if ask.response_format != "b64_json":
            raise HTTPException(400, "response_format: b64_json is the only one")
        width, height = _size(ask.size)
        drawn = await desk.draw(Ask(prompt=ask.prompt, width=width, height=height), ask.n)
        data = [{"b64_json": await _encoded(done, receipts), **_revised(done)} for done in drawn]
        return {"created": int(time.time()), "data": data}

    @app.get("/status")
    def state() -> JSONResponse:
        found = [each for each in status(worker.pipe) if each.handle is worker.handle]
        is_active = bool(found) and found[0].active
        about = {"active": is_active, "patch": content_hash, "waiting": worker.waiting}
        about |= {"guard": door.describe() if door else None}
        if found:
            about |= {"categories": found[0].categories, "scale": found[0].scale, "stats": vars(found[0].stats)}
        return JSONResponse(about, 200 if is_active else 503)

    @app.get("/metrics")
    def counted() -> Response:
        return Response(metrics.page(worker), media_type=MEDIA_TYPE)

    return app


Next = Callable[[Request], Awaitable[Response]]


def _doorman(keys: Keys, metrics: Metrics) -> Callable[[Request, Next], Awaitable[Response]]:
    """Asks for keys, and counts what was answered."""

    async def let(request: Request, go_on: Next) -> Response:
        path = request.url.path
        if path in OPEN or keys.let(request.headers.get("authorization", "")):
            answer = await _answered(request, go_on)
        else:
            answer = refused(401, "no or no valid API key; send it as 'Authorization: Bearer KEY'")
        known = path if path in (*OPEN, "/generate", "/v1/images/generations") else "other"
        metrics.requests.labels(path=known, code=answer.status_code).inc()
        return answer

    return let


async def _answered(request: Request, go_on: Next) -> Response:
    """The answer; whatever nobody foresaw is logged, and its kind alone is told."""
    try:
        return await go_on(request)
    except Exception as error:
        LOG.exception("a request failed")
        return refused(500, f"drawing failed: {type(error).__name__}")


def _size(text: str | None) -> tuple[int | None, int | None]:
    """Width and height of `512x512`; of `auto`, or nothing, the model's own."""
    if text in (None, "auto"):
        return None, None
    width, _, height = text.partition("x")
    if not all(
        side.isascii() and side.isdecimal() and 0 < len(side) < 6 and int(side) >= GRID for side in (width, height)
    ):
        raise HTTPException(400, "size: WIDTHxHEIGHT, for instance 512x512")
    return int(width), int(height)


def _revised(done: Done) -> dict[str, str]:
    """What OpenAI's clients expect of a prompt that was drawn in other words."""
    return {"revised_prompt": done.job.prompt} if done.decision and done.decision.is_rewritten else {}


async def _encoded(done: Done, receipts: Receipts | None) -> str:
    return await run_in_threadpool(_png, done, receipts)


def _png(done: Done, receipts: Receipts | None) -> str:
    picture = as_picture(done.answer.image)
    data = png(picture) if receipts is None else receipts.put_into(picture, done.job, done.answer, done.decision)
    return base64.b64encode(data).decode()

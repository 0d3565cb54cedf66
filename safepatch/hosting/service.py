"""The server's HTTP side: what is asked is checked, lined up for the worker, and answered, or refused in one sentence.

No answer holds an image that was drawn without the patch: see `worker`.
"""

import asyncio
import base64
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from io import BytesIO
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from safepatch.data.prompts import admit
from safepatch.diffusion import as_picture, denoiser, usual_guidance
from safepatch.errors import PatchBypassed, PromptError, printable
from safepatch.hosting.limits import Keys, Limits, WholeBodies, error_body
from safepatch.hosting.metrics import MEDIA_TYPE, Metrics
from safepatch.hosting.worker import Answer, Job, Overloaded, Shape, Worker
from safepatch.runtime.check import status

LOG = logging.getLogger(__name__)
GRID = 8  # pixels: a picture's sides are multiples of it
KINDS = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 503: "overloaded_error"}
OPEN = ("/status", "/metrics")  # paths for which no key is asked: they tell nothing of any prompt


class Ask(BaseModel):
    """The body of `POST /generate`."""

    model_config = ConfigDict(extra="forbid")
    prompt: str
    negative_prompt: str = ""
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    steps: int = Field(default=20, ge=1)
    guidance_scale: float | None = Field(default=None, ge=0, le=100, allow_inf_nan=False)
    width: int | None = Field(default=None, ge=GRID)
    height: int | None = Field(default=None, ge=GRID)


class AskLikeOpenAI(BaseModel):
    """The body of `POST /v1/images/generations`; what it has beside this is not looked at."""

    prompt: str
    n: int = Field(default=1, ge=1)
    size: str | None = None
    response_format: str = "b64_json"


class Desk:
    """Turns what is asked into jobs, and waits for them.

    Args:
        worker: that draws.
        limits: of what may be asked.
        metrics: in which answers are counted.
    """

    def __init__(self, worker: Worker, limits: Limits, metrics: Metrics) -> None:
        self.worker, self._limits, self._metrics = worker, limits, metrics

    async def draw(self, ask: Ask, images: int = 1) -> list[tuple[int, Answer]]:
        """Each image with its seed; those after the first have the seeds that follow."""
        shape, deadline = self._shape(ask), time.monotonic() + self._limits.timeout
        if images > self._limits.images:
            raise HTTPException(400, f"n: {self._limits.images} images at most")
        first = secrets.randbits(32) if ask.seed is None else ask.seed
        seeds = range(first, first + images)
        jobs = [Job(ask.prompt.strip(), ask.negative_prompt, seed, shape, deadline) for seed in seeds]
        self.worker.submit(jobs)
        waits = [asyncio.wrap_future(job.answer) for job in jobs]
        try:
            answers = await asyncio.wait_for(asyncio.gather(*waits), self._limits.timeout)
        except TimeoutError:
            raise HTTPException(504, f"the image was not done in {self._limits.timeout:g} seconds") from None
        finally:
            for wait in waits:
                wait.cancel()
        for answer in answers:
            self._count(answer)
        return list(zip(seeds, answers, strict=True))

    def opened(self, answer: Answer) -> list[str]:
        """The categories whose gate opened for an image."""
        return list(answer.drawn.opened(self.worker.handle.thresholds))

    def _count(self, answer: Answer) -> None:
        self._metrics.images.labels(acted=str(bool(answer.drawn.acted)).lower()).inc()
        for name in self.opened(answer):
            self._metrics.opened.labels(category=name).inc()

    def _shape(self, ask: Ask) -> Shape:
        admit([ask.prompt])
        for name in ("prompt", "negative_prompt"):
            if len(getattr(ask, name)) > self._limits.prompt:
                raise HTTPException(400, f"{name}: {self._limits.prompt} characters at most")
        if ask.steps > self._limits.steps:
            raise HTTPException(400, f"steps: {self._limits.steps} at most")
        host = denoiser(self.worker.pipe)
        own = host.config.sample_size * self.worker.pipe.vae_scale_factor
        sides = {"width": ask.width or own, "height": ask.height or own}
        for name, value in sides.items():
            if value > max(self._limits.edge, own) or value % GRID:
                raise HTTPException(400, f"{name}: a multiple of {GRID}, {max(self._limits.edge, own)} at most")
        guidance = usual_guidance(host) if ask.guidance_scale is None else ask.guidance_scale
        return Shape(ask.steps, guidance, sides["width"], sides["height"], bool(ask.negative_prompt))


def create_app(worker: Worker, content_hash: str, keys: Keys, limits: Limits | None = None) -> FastAPI:
    """The application; the worker runs as long as whoever made it lets it.

    Args:
        worker: that draws, with a patch.
        content_hash: of the patch.
        keys: of those who may ask.
        limits: of what they may.
    """
    limits, metrics = limits or Limits(), Metrics()
    worker.watch = metrics.watch
    app, desk = FastAPI(title="safepatch", docs_url=None, redoc_url=None), Desk(worker, limits, metrics)
    _refusals(app)
    app.middleware("http")(_doorman(keys, metrics))
    app.add_middleware(WholeBodies, limits=limits)

    @app.post("/generate")
    async def generate(ask: Ask) -> dict[str, Any]:
        ((seed, answer),) = await desk.draw(ask)
        did = {"acted_steps": answer.drawn.acted, "opened": desk.opened(answer)}
        return {"image": await _encoded(answer), "seed": seed, "identical_to_base": not answer.drawn.acted, **did}

    @app.post("/v1/images/generations")
    async def generations(ask: AskLikeOpenAI) -> dict[str, Any]:
        if ask.response_format != "b64_json":
            raise HTTPException(400, "response_format: b64_json is the only one")
        width, height = _size(ask.size)
        drawn = await desk.draw(Ask(prompt=ask.prompt, width=width, height=height), ask.n)
        return {"created": int(time.time()), "data": [{"b64_json": await _encoded(answer)} for _, answer in drawn]}

    @app.get("/status")
    def state() -> JSONResponse:
        found = [each for each in status(worker.pipe) if each.handle is worker.handle]
        is_active = bool(found) and found[0].active
        about = {"active": is_active, "patch": content_hash, "waiting": worker.waiting}
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


def refused(code: int, message: str, retry_after: int | None = None) -> JSONResponse:
    """An answer without an image."""
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    return JSONResponse(error_body(printable(message), KINDS.get(code, "server_error")), code, headers)


def _refusals(app: FastAPI) -> None:
    """What is answered to whatever goes wrong."""

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

    @app.exception_handler(Overloaded)
    async def overloaded(_: Request, error: Overloaded) -> Response:
        return refused(503, str(error), error.seconds)

    @app.exception_handler(PatchBypassed)
    async def bypassed(_: Request, error: PatchBypassed) -> Response:
        return refused(503, f"no image: {error}", 60)


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


async def _encoded(answer: Answer) -> str:
    return await run_in_threadpool(_png, answer)


def _png(answer: Answer) -> str:
    with BytesIO() as buffer:
        as_picture(answer.image).save(buffer, "PNG")
        return base64.b64encode(buffer.getvalue()).decode()

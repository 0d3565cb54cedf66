"""Turns what is asked of a server into jobs, judged by a guard where there is one, and waits for them."""

import asyncio
import secrets
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from safepatch.data.prompts import admit
from safepatch.diffusion import denoiser, own_sides, usual_guidance
from safepatch.errors import ConfigError, PromptBlocked, UnknownName
from safepatch.guard.decide import Decision
from safepatch.hosting.door import Door, Unjudged
from safepatch.hosting.limits import Limits
from safepatch.hosting.metrics import Metrics
from safepatch.hosting.worker import Answer, Job, Shape, Worker
from safepatch.runtime.parts import Scale

GRID = 8  # pixels: a picture's sides are multiples of it, of what transformers draw of twice as many


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
    scale: float | dict[str, float] | None = None


class AskLikeOpenAI(BaseModel):
    """The body of `POST /v1/images/generations`; what it has beside this is not looked at."""

    prompt: str
    n: int = Field(default=1, ge=1)
    size: str | None = None
    response_format: str = "b64_json"


class Done(NamedTuple):
    """An image that was drawn for somebody.

    Attributes:
        job: what for.
        answer: it, and what the patch did.
        decision: of the guard; None without one.
    """

    job: Job
    answer: Answer
    decision: Decision | None

    def judged(self) -> dict[str, Any]:
        """What the guard thought, for whoever asked."""
        if self.decision is None:
            return {}
        said = {"category": self.decision.category, "probability": round(self.decision.probability, 4)}
        return {"guard": said | {"claimed": self.decision.is_claimed, "rewritten": self.decision.is_rewritten}}


class Desk:
    """Turns what is asked into jobs, and waits for them.

    Args:
        worker: that draws.
        limits: of what may be asked.
        metrics: in which answers are counted.
        door: that judges prompts beforehand, if any does.
    """

    def __init__(self, worker: Worker, limits: Limits, metrics: Metrics, door: Door | None = None) -> None:
        self.worker, self.door, self._limits, self._metrics = worker, door, limits, metrics

    async def draw(self, ask: Ask, images: int = 1) -> list[Done]:
        """What is asked for; images after the first have the seeds that follow."""
        shape, deadline = self._shape(ask), time.monotonic() + self._limits.timeout
        if images > self._limits.images:
            raise HTTPException(400, f"n: {self._limits.images} images at most")
        prompt, decision = ask.prompt.strip(), await self._judged(ask.prompt.strip(), deadline)
        if decision and decision.drawn:
            prompt = decision.drawn
            admit([prompt])
        first = secrets.randbits(32) if ask.seed is None else ask.seed
        seeds = range(first, first + images)
        jobs = [Job(prompt, ask.negative_prompt, seed, shape, deadline) for seed in seeds]
        answers = await self._drawn(jobs, deadline)
        return [Done(job, answer, decision) for job, answer in zip(jobs, answers, strict=True)]

    async def _drawn(self, jobs: list[Job], deadline: float) -> list[Answer]:
        self.worker.submit(jobs)
        waits = [asyncio.wrap_future(job.answer) for job in jobs]
        try:
            answers = await asyncio.wait_for(asyncio.gather(*waits), deadline - time.monotonic())
        except TimeoutError:
            raise HTTPException(504, f"the image was not done in {self._limits.timeout:g} seconds") from None
        finally:
            for wait in waits:
                wait.cancel()
        for answer in answers:
            self._count(answer)
        return answers

    async def _judged(self, prompt: str, deadline: float) -> Decision | None:
        """What the guard says of a prompt that may be drawn; counts all."""
        if self.door is None:
            return None
        outcome, category = "failed", ""
        try:
            decision = await asyncio.wait_for(self.door.admit(prompt), deadline - time.monotonic())
            outcome = "rewritten" if decision.is_rewritten else "claimed" if decision.is_claimed else "passed"
            category = decision.category if decision.is_claimed else ""
        except PromptBlocked as error:
            outcome, category = "blocked", error.category
            raise
        except TimeoutError:
            raise Unjudged(f"the prompt was not judged in {self._limits.timeout:g} seconds; no image") from None
        finally:
            self._metrics.judged.labels(outcome=outcome, category=category).inc()
        return decision

    def opened(self, answer: Answer) -> list[str]:
        """The categories whose gate opened for an image."""
        return list(answer.drawn.opened(self.worker.handle.thresholds, self.worker.handle.looks))

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
        own, unit = own_sides(self.worker.pipe)
        most, unit = max(self._limits.edge, own), max(GRID, unit)
        sides = {"width": ask.width or own, "height": ask.height or own}
        for name, value in sides.items():
            if value > most or value % unit:
                raise HTTPException(400, f"{name}: a multiple of {unit}, {most} at most")
        guidance = usual_guidance(denoiser(self.worker.pipe)) if ask.guidance_scale is None else ask.guidance_scale
        negative, scale = bool(ask.negative_prompt), self._scale(ask.scale)
        return Shape(ask.steps, guidance, sides["width"], sides["height"], negative, scale)

    def _scale(self, asked: Scale | None) -> Scale | None:
        """The patch's strength, where one is asked for that may be; categories that are not named are at 1."""
        least = self._limits.least_scale
        if asked is None or asked == {}:
            return None
        if least is None:
            raise HTTPException(400, "scale: this server lets nobody choose the patch's strength")
        if not all(least <= value <= 1 for value in (asked.values() if isinstance(asked, Mapping) else [asked])):
            raise HTTPException(400, f"scale: from {least:g} to 1")
        try:
            self.worker.handle.require_scale(asked)
        except (ConfigError, UnknownName) as error:
            raise HTTPException(400, f"scale: {error}") from None
        return asked

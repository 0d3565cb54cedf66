"""What a patch costs a server: the same requests at once, answered with a patch that acts, one that is shut, and none.

    python benchmarks/serve.py [REQUESTS]

In one process, over ASGI, on the embedded model; in turns, so that whatever else the machine does meets all alike. Only
here a worker is let draw without a patch.
"""

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx2
from numpy import percentile

from safepatch.diffusion import generate, quiet
from safepatch.hosting.limits import Keys, Limits
from safepatch.hosting.recording import Drawn
from safepatch.hosting.service import create_app
from safepatch.hosting.worker import Answer, Job, Worker
from safepatch.models.load import load_pipeline
from safepatch.runtime.apply import apply
from safepatch.shipped import shipped_patches

BODY = {"steps": 4, "seed": 0}
TURNS = 4


class Unpatched(Worker):
    """Draws with a pipeline from which the patch was taken off."""

    def require_patched(self) -> None:
        """Anything goes."""

    def _draw(self, jobs: Sequence[Job]) -> list[Answer]:
        shape, texts, seeds = jobs[0].shape, [job.prompt for job in jobs], [job.seed for job in jobs]
        images = generate(
            self.pipe, texts, seeds, shape.steps, shape.guidance_scale, height=shape.height, width=shape.width
        )
        return [Answer(image, Drawn(), 0.0) for image in images]


async def answered(app: Any, prompt: str, n: int) -> list[float]:
    """Seconds after which each of n requests was answered."""
    started = time.monotonic()

    async def one(client: httpx2.AsyncClient) -> float:
        answer = await client.post("/generate", json={**BODY, "prompt": prompt})
        assert answer.status_code == 200, answer.text
        return time.monotonic() - started

    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://here", timeout=3600) as client:
        return await asyncio.gather(*(one(client) for _ in range(n)))


def main(n: int) -> None:
    """Measure, print."""
    pipe, patch = quiet(load_pipeline("tiny-sd")), shipped_patches("lora")["weapons"].path
    runs: dict[str, tuple[Callable[..., Worker], str]] = {
        "base": (Unpatched, "a knife"),
        "gate shut": (Worker, "a dog"),
        "acting": (Worker, "a knife"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(TURNS):
        for name, (kind, prompt) in runs.items():
            with apply(pipe, patch) as handle:
                if kind is Unpatched:
                    handle.remove()
                with kind(pipe, handle, 4, n) as worker:
                    app = create_app(worker, "", Keys(), Limits(timeout=3600))
                    seconds[name] += asyncio.run(answered(app, prompt, n // TURNS))
    half, most = (percentile(seconds["base"], share) for share in (50, 95))
    for name, took in seconds.items():
        own, longest = percentile(took, 50), percentile(took, 95)
        ratio = f"{own / half:.2f} and {longest / most:.2f} of the base's"
        print(f"{name:10} p50 {own:.2f} s, p95 {longest:.2f} s: {ratio}; {len(took)} requests, {n // TURNS} at once")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)

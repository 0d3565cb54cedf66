"""What a patch costs a server: the same requests at once, answered with a patch that acts, one that is shut, and none.

    python benchmarks/serve.py [REQUESTS]

In one process, over ASGI, on the embedded model; only here a worker is let draw without a patch.
"""

import asyncio
import sys
import time
from collections.abc import Callable
from typing import Any

import httpx2
from numpy import percentile

from safepatch.diffusion import quiet
from safepatch.hosting.limits import Keys, Limits
from safepatch.hosting.service import create_app
from safepatch.hosting.worker import Worker
from safepatch.models.load import load_pipeline
from safepatch.runtime.apply import apply
from safepatch.shipped import shipped_patches

BODY = {"steps": 4, "seed": 0}


class Unpatched(Worker):
    """Draws whatever hangs on its pipeline, at scale 0 as the base does."""

    def require_patched(self) -> None:
        """Anything goes."""


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
    runs: dict[str, tuple[Callable[..., Worker], str, float]] = {
        "base": (Unpatched, "a knife", 0.0),
        "gate shut": (Worker, "a dog", 1.0),
        "acting": (Worker, "a knife", 1.0),
    }
    base: tuple[float, float] | None = None
    with apply(pipe, patch) as handle:
        for name, (kind, prompt, scale) in runs.items():
            handle.scale = scale
            with kind(pipe, handle, 4, n) as worker:
                app = create_app(worker, "", Keys(), Limits(timeout=3600))
                seconds = asyncio.run(answered(app, prompt, n))
            half, most = float(percentile(seconds, 50)), float(percentile(seconds, 95))
            base = base or (half, most)
            ratio = f"{half / base[0]:.2f} and {most / base[1]:.2f} of the base's"
            print(f"{name:10} p50 {half:.2f} s, p95 {most:.2f} s: {ratio}; {n / max(seconds):.1f} images a second")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)

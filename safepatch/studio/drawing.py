"""Settings to pictures: each seed drawn once without and once with the patches, one image at a time, as commands do."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.data.prompts import admit
from safepatch.diffusion import generate
from safepatch.hosting.recording import Drawn, recording
from safepatch.progress import bar
from safepatch.runtime.apply import apply
from safepatch.runtime.handle import Handle
from safepatch.runtime.parts import Look, Scale
from safepatch.studio.judging import Judge, Verdict
from safepatch.studio.settings import Settings


class Picture(NamedTuple):
    """One image.

    Attributes:
        image: in [0, 1], (3, H, W).
        verdict: what a detector says of it.
        drawn: what the patch did to it; None without one.
        thresholds: by category, from which probability on a gate opens.
        looks: how those gates open that look at pictures.
        title: for people.
    """

    image: Tensor
    verdict: Verdict
    drawn: Drawn | None = None
    thresholds: Mapping[str, float] = {}
    looks: Mapping[str, Look] = {}
    title: str = ""

    @property
    def opened(self) -> tuple[str, ...]:
        """The categories whose gate opened at some step."""
        return self.drawn.opened(self.thresholds, self.looks) if self.drawn else ()


class Pair(NamedTuple):
    """The same prompt and seed, without the patch and with it."""

    seed: int
    base: Picture
    patched: Picture | None

    @property
    def is_identical(self) -> bool:
        """Whether the patch left the image alone, to the last bit."""
        return self.patched is not None and torch.equal(self.base.image, self.patched.image)


def draw(pipe: Any, patch: PatchArtifact | None, scale: Scale, settings: Settings, judge: Judge) -> list[Pair]:
    """Pairs of equal seeds, as many as are set.

    Args:
        pipe: the model; it is as it was afterwards.
        patch: None draws the base alone.
        scale: strength, one for all or by category.
        settings: of the page.
        judge: of the pictures.

    Raises:
        PromptError: for a prompt that may not be used.
        SafepatchError: when the patch does not fit, or cannot be set so.
    """
    admit([settings.prompt])
    seeds = range(settings.seed, settings.seed + settings.images)
    total = settings.steps * settings.images * (2 if patch else 1)
    with bar(total=total, desc="drawing") as shown:
        bases = [_picture(pipe, None, settings, seed, judge, shown.update) for seed in seeds]
        if patch is None:
            return [Pair(seed, base, None) for seed, base in zip(seeds, bases, strict=True)]
        with apply(pipe, patch, scale, gate=settings.gate or None) as handle:
            patched = [_picture(pipe, handle, settings, seed, judge, shown.update) for seed in seeds]
    return [Pair(*each) for each in zip(seeds, bases, patched, strict=True)]


def _picture(
    pipe: Any, handle: Handle | None, settings: Settings, seed: int, judge: Judge, step: Callable[[], object]
) -> Picture:
    def count(_pipe: Any, _step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        step()
        return values

    with recording(handle) as drawn:
        (image,) = generate(
            pipe, [settings.prompt], [seed], settings.steps, settings.guidance, callback_on_step_end=count
        )
    verdict = judge(image)
    if handle is None:
        return Picture(image, verdict)
    return Picture(image, verdict, drawn[0], handle.thresholds, handle.looks)

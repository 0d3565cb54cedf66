"""Patches that draw every picture in one step: what their files say, and what a pipeline must be like."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from safepatch.artifact.info import PatchInfo
from safepatch.diffusion import draws_in_one_step, one_step_scheduler
from safepatch.errors import ConfigError
from safepatch.runtime.call import Begun

ONE_STEP = "one_step"  # what a file's configuration calls it


def step_of(info: PatchInfo) -> int | None:
    """The timestep at which a patch's only step begins; None of one that corrects a denoising of any length."""
    record = info.config.get(ONE_STEP)
    return record["timestep"] if record else None


def require_scheduler(pipe: Any, timestep: int) -> None:
    """Raise `ConfigError` unless the pipeline's scheduler can take a single step from `timestep`."""
    if not draws_in_one_step(pipe.scheduler, timestep):
        name = type(pipe.scheduler).__name__
        raise ConfigError(
            f"this patch draws in one step from timestep {timestep}, and this {name} does not; apply it within "
            "`with safepatch.one_step(pipe, safepatch.read_info(patch))`, or set a scheduler that does"
        )


def require_step(begun: Begun, timestep: int) -> None:
    """Raise `ConfigError` where a call that the patch is to act in is another than its one step, or is guided."""
    if begun.given is None or begun.call is None:
        return
    if begun.given.timestep != timestep:
        raise ConfigError(
            f"this patch draws in one step from timestep {timestep}, and was asked at {begun.given.timestep:g}; set "
            "num_inference_steps=1, or take it off"
        )
    if begun.call.rows.start:
        raise ConfigError("this patch draws without guidance; set guidance_scale=1, or take it off")


@contextmanager
def one_step(pipe: Any, info: PatchInfo | None) -> Iterator[None]:
    """Within the block the pipeline has a scheduler with which the patch can draw, where it must be a certain one."""
    before, timestep = pipe.scheduler, step_of(info) if info else None
    if timestep is not None and not draws_in_one_step(before, timestep):
        pipe.scheduler = one_step_scheduler(before, timestep)
    try:
        yield
    finally:
        pipe.scheduler = before

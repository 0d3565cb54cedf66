"""Who is drawing: the pipelines on the call stack, this thread's or another's, and what they say of their rows."""

import sys
import threading
import weakref
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

_MODULE_CALL = nn.Module._call_impl.__code__


class Drawing:
    """One call of a pipeline.

    Attributes:
        thread: it runs in.
        is_disturbed: whether another thread called the same pipeline meanwhile.
    """

    def __init__(self, frame: FrameType) -> None:
        self.thread, self.is_disturbed = threading.get_ident(), False
        self._frame, self._code = id(frame), frame.f_code
        self._pipe = weakref.ref(frame.f_locals["self"])
        steps = frame.f_locals.get("timesteps")
        self._steps = weakref.ref(steps) if isinstance(steps, Tensor) else None

    def is_at(self, frame: FrameType) -> bool:
        """Whether it is the call that runs in this frame of its thread; another call may reuse a frame's memory."""
        if id(frame) != self._frame or frame.f_code is not self._code:
            return False
        steps = None if self._steps is None else self._steps()
        is_same = self._steps is None or (steps is not None and steps is frame.f_locals.get("timesteps"))
        return is_same and frame.f_locals.get("self") is self._pipe()

    @property
    def is_running(self) -> bool:
        """Whether it has not returned yet."""
        frames = _methods(sys._current_frames().get(self.thread))
        return any(id(frame) == self._frame and self.is_at(frame) for frame in frames)

    def is_beside(self, other: "Drawing") -> bool:
        """Whether it is another thread's call of the same pipeline, and has not returned yet."""
        return self.thread != other.thread and self._pipe() is other._pipe() and self.is_running


def drawing(last: Drawing | None = None) -> Drawing | None:
    """The call of the innermost pipeline on this thread's stack: `last` itself, if that is the one."""
    frame = _calling_frame()
    if frame is None:
        return None
    return last if last is not None and last.is_at(frame) else Drawing(frame)


def calling_pipeline() -> DiffusionPipeline | None:
    """The innermost pipeline on this thread's call stack: whoever is drawing right now."""
    frame = _calling_frame()
    return frame and frame.f_locals["self"]


def calling_pipelines() -> list[DiffusionPipeline]:
    """All pipelines on this thread's call stack, the innermost first: one may draw with another."""
    return [frame.f_locals["self"] for frame in _methods(sys._getframe(1)) if _is_a_pipelines(frame)]


def threads_inside(module: nn.Module) -> set[int]:
    """The threads that are running a call of `module` now."""
    return {
        thread
        for thread, top in sys._current_frames().items()
        if any(frame.f_code is _MODULE_CALL and frame.f_locals["self"] is module for frame in _stack(top))
    }


def steps_ahead() -> list[float]:
    """The timesteps that the pipeline which is drawing goes through, as far as it says; else none."""
    frame = _calling_frame()
    steps = None if frame is None else frame.f_locals.get("timesteps")
    if isinstance(steps, Tensor):
        return steps.flatten().tolist()
    return [float(step) for step in steps] if isinstance(steps, list | tuple) else []


@torch.compiler.disable()
def is_negative_prompt(states: Tensor) -> bool:
    """Whether the pipeline that is drawing calls its host for the negative prompt alone, with these text states.

    States that are the prompt's as well count as the prompt's.
    """
    frame = _calling_frame()
    if frame is None or frame.f_locals.get("prompt_embeds") is states:
        return False
    return frame.f_locals.get("negative_prompt_embeds") is states


def negative_rows(states: Tensor) -> int:
    """How many of the first rows of a call carry the negative prompt.

    Some do only where the pipeline that is drawing is guided in this very call and the first rows hold what it calls
    its negative prompt's states, with equally many for each of the parts behind them. What a pipeline did last, and
    what other loops that call its host mean by their rows, counts for nothing; in doubt there are none.

    Args:
        states: text states of the call, (B, tokens, width).
    """
    frame = _calling_frame()
    if frame is None or not _is_guided(frame.f_locals):
        return 0
    negative: Any = frame.f_locals.get("negative_prompt_embeds")
    if not isinstance(negative, Tensor) or not 0 < len(negative) < len(states) or len(states) % len(negative):
        return 0
    return len(negative) if _equal(states[: len(negative)], negative) else 0


def _is_guided(names: dict[str, Any]) -> bool:
    """Whether a pipeline whose frame holds these names applies classifier-free guidance."""
    if (said := names.get("do_classifier_free_guidance")) is not None:
        return bool(said)
    return bool(getattr(names["self"], "do_classifier_free_guidance", False))


def _equal(left: Tensor, right: Tensor) -> bool:
    return left.device == right.device and torch.equal(left, right.to(left.dtype))


def _calling_frame() -> FrameType | None:
    return next((frame for frame in _methods(sys._getframe(1)) if _is_a_pipelines(frame)), None)


def _is_a_pipelines(frame: FrameType) -> bool:
    return isinstance(frame.f_locals.get("self"), DiffusionPipeline)


def _methods(frame: FrameType | None) -> Iterator[FrameType]:
    """The frames of methods. Asking a frame for its locals makes it keep them alive, so others are not asked."""
    return (frame for frame in _stack(frame) if frame.f_code.co_varnames[:1] == ("self",))


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back

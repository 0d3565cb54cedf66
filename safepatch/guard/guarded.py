"""A guard before a pipeline: what it is asked is scored first, then drawn, refused, or drawn in other words.

The pipeline's class is exchanged for one that reads its arguments and then does what it did; inside, hooks on the text
encoders notice another pipeline that was made of the same parts and has no guard. So patches may be applied before,
after or meanwhile.
"""

import functools
import inspect
import warnings
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safepatch.diffusion import calling_pipelines, denoiser, uncompiled
from safepatch.errors import PromptBlocked, lookup
from safepatch.guard.decide import ACTIONS, Decision, decide, refusal
from safepatch.guard.file import Guard
from safepatch.patch.hooks import Hooks
from safepatch.runtime.handle import attached

PROMPTS = ("prompt", "prompt_2", "prompt_3")  # what pipelines call their texts
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
STATES = ("prompt_embeds", "prompt_embeds_2", "pooled_prompt_embeds")
REMEMBERED = 256  # decisions
_GUARDS = "_safepatch_guards"  # attribute of a guarded pipeline


class Guarded:
    """A guard at a pipeline; leaving the `with` block, or `remove()`, takes it away.

    Attributes:
        guard: what decides.
        action: `score`, `block` or `rewrite`; may be changed between calls.
        decisions: the latest, in order.
    """

    def __init__(self, pipe: Any, guard: Guard, action: str) -> None:
        lookup(dict.fromkeys(ACTIONS), action, what="action of a guard")
        self.guard, self.action = guard, action
        self.decisions: deque[Decision] = deque(maxlen=REMEMBERED)
        self._pipe = pipe
        if not hasattr(pipe, _GUARDS):
            setattr(pipe, _GUARDS, [])
            pipe.__class__ = _guarded_class(type(pipe))
        getattr(pipe, _GUARDS).append(self)
        self._hooks = Hooks()
        for encoder in (uncompiled(getattr(pipe, name, None)) for name in ENCODERS):
            if encoder is not None:
                self._hooks.before(encoder, self._require_own)

    def __enter__(self) -> "Guarded":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Take the guard away; twice is harmless."""
        guards = getattr(self._pipe, _GUARDS, [])
        self._hooks.remove()
        if self in guards:
            guards.remove(self)
            if not guards:
                delattr(self._pipe, _GUARDS)
                self._pipe.__class__ = type(self._pipe).__mro__[1]

    def admit(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """A call's arguments as they may be drawn.

        Raises:
            PromptBlocked: for a prompt that is refused, and for text states, whose words nobody can read.
        """
        changed = dict(given)
        if any(given.get(name) is not None for name in STATES) and self.action != "score":
            raise PromptBlocked("a guard reads words, not text states; pass prompt= instead of prompt_embeds=")
        for name in PROMPTS:
            text = given.get(name)
            if isinstance(text, str):
                changed[name] = self._decided([text])[0]
            elif text is not None:
                changed[name] = self._decided(list(text))
        return changed

    def _require_own(self, *_: object) -> None:
        """Whoever draws with the guarded pipeline's text encoders is that pipeline, or has a guard of its own."""
        drawing = calling_pipelines()
        if not drawing or any(hasattr(pipe, _GUARDS) for pipe in drawing):
            return
        told = f"{type(drawing[0]).__name__} shares a guarded pipeline's text encoder and has no guard; guard it too"
        if self.action != "score":
            raise PromptBlocked(told)
        warnings.warn(told, stacklevel=2)

    def _decided(self, texts: list[str]) -> list[str]:
        return [self._drawn(decision) for decision in decide(self.guard, self.action, texts)]

    def _drawn(self, decision: Decision) -> str:
        self.decisions.append(decision)
        if decision.drawn is None:
            raise refusal(decision, self.action)
        if decision.is_rewritten:
            told = f"a prompt for {decision.category} ({decision.probability:.2f}) is drawn in other words"
            warnings.warn(f"{told}: '{decision.drawn[:200]}'", stacklevel=6)
        return decision.drawn


def guarded(pipe: Any, guard: str | Path | Guard, action: str = "block") -> Guarded:
    """Put a guard before a pipeline.

    Args:
        pipe: a diffusers pipeline that is asked in words; with a patch or without.
        guard: path of a guard's file, or an opened one.
        action: `score`: everything is drawn, and `Guarded.decisions` tells what was thought of it; `block`: what a
            category claims raises `PromptBlocked`; `rewrite`: its concepts' replacements are drawn instead, with a
            warning, and what still is claimed, or names no concept, is blocked.

    Returns:
        The handle; use it in `with`, or call its `remove()`.

    Raises:
        ArtifactError: when the file is missing, damaged, altered, or no guard.
        BaseMismatch: when the guard was trained on another text encoder than the pipeline's.
        UnknownName: for another action.
    """
    opened = guard if isinstance(guard, Guard) else Guard.open(guard)
    _say_lacking(pipe, opened)
    return Guarded(pipe, opened.bind(pipe), action)


def _say_lacking(pipe: Any, guard: Guard) -> None:
    """A patch on the pipeline corrects nothing of what it was not made for."""
    handles = attached(uncompiled(denoiser(pipe)))
    patched = {name for handle in handles for name in handle.categories}
    if patched and (missing := sorted(set(guard.categories) - patched)):
        warnings.warn(f"the patch lacks {', '.join(missing)}; there the guard alone decides", stacklevel=3)


def _guarded_class(kind: type) -> type:
    """A class that is `kind` but for what stands before its calls."""
    call: Any = kind.__call__
    signature = inspect.signature(call)

    @functools.wraps(call)
    def admitted(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs)
        for guard in list(getattr(self, _GUARDS, ())):
            given.arguments |= guard.admit(given.arguments)
        return call(*given.args, **given.kwargs)

    return type(kind.__name__, (kind,), {"__call__": admitted, "__module__": kind.__module__, "__doc__": kind.__doc__})

"""How a patch that computes residuals meets its host: hooks that take the host's features and add the residuals.

The residual arguments of a UNet are passed before its encoder has run, too early for an answer to what it makes, and
whoever wraps its `forward` may drop them unnoticed. So the features are taken where they are made, and the residuals go
in where the decoder's blocks pick the skips up, which tells whether they were; the encoder's own path is left alone, as
ControlNet leaves it (Zhang et al. 2023, arXiv 2302.05543, figure 3).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, cast

from torch import Tensor, nn

from safepatch.diffusion import Conditioning, Host
from safepatch.patch.base import Features, ResidualPatch, Residuals, plus
from safepatch.patch.hooks import Calls, Hooks
from safepatch.patch.lite_tokens import TokenLitePatch
from safepatch.patch.lora import LoraPatch
from safepatch.patch.places import Told
from safepatch.patch.text import TextPatch, patched_conditioning

Answer = Callable[[Features], Residuals | None]
SKIPS = "res_hidden_states_tuple"


@dataclass
class Passing:
    """What one call of the host has made so far, and what is to be added to it.

    Attributes:
        early: residuals known before the call.
        skips: of the encoder; none before its first layer has run.
        asked: whether the encoder has run, and the answer to it was asked for.
        down, mid: what is still to be added, the decoder's next last.
    """

    early: Residuals | None = None
    skips: list[Tensor] = field(default_factory=list)
    asked: bool = False
    down: tuple[Tensor, ...] = ()
    mid: Tensor | None = None


class HostHooks:
    """Hooks on a UNet that add residuals known before a call, and those that `answer` returns to its features.

    The features are the host's own, whatever ControlNets and other patches add to them: several such hooks on one
    UNet see the same, and their residuals add up.
    """

    def __init__(self, unet: Any, answer: Answer) -> None:
        self._answer = answer
        self._calls = Calls(Passing)
        self.hooks = Hooks()
        self.hooks.after(unet.conv_in, self._begin)
        for block in unet.down_blocks:
            self.hooks.after(block, self._collect)
        self.hooks.after(unet.mid_block, self._ask)
        for block in unet.up_blocks:
            self.hooks.before(block, self._add, with_kwargs=True)

    def begin(self) -> None:
        """The UNet is about to be called."""
        self._calls.begin()

    def add(self, early: Residuals) -> None:
        """These are to be added in the call that has begun, whatever the UNet makes of it."""
        self._calls.now.early = early

    def end(self) -> list[str]:
        """The call has ended; what did not happen in it."""
        passed = self._calls.end()
        is_done = passed is not None and passed.asked and not passed.down and passed.mid is None
        return [] if is_done else ["what the patch adds to its skips was not taken up"]

    def _begin(self, _: nn.Module, args: tuple, output: Tensor) -> None:
        now = self._calls.now  # a call that failed leaves nothing to the next
        now.skips, now.down, now.mid, now.asked = [output], (), None, False

    def _collect(self, _: nn.Module, args: tuple, output: tuple[Tensor, tuple[Tensor, ...]]) -> None:
        if skips := self._calls.now.skips:
            skips.extend(output[1])

    def _ask(self, _: nn.Module, args: tuple, output: Tensor) -> None:
        now = self._calls.now
        if not now.skips:  # the first layer's hook is lost: see `end`
            return
        features, now.skips, now.asked = Features(tuple(now.skips), output), [], True
        made = [residuals for residuals in (now.early, self._answer(features)) if residuals is not None]
        self._expect(reduce(plus, made) if made else None)

    def _expect(self, residuals: Residuals | None) -> None:
        """The decoder's blocks are to add these."""
        if residuals is not None:
            self._calls.now.down, self._calls.now.mid = residuals

    def _add(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        skips, now = kwargs[SKIPS], self._calls.now
        if not now.down or now.down[-1].shape != skips[-1].shape:  # another block's hook is lost: see `end`
            return None
        residuals, now.down = now.down[-len(skips) :], now.down[: -len(skips)]
        kwargs = {**kwargs, SKIPS: tuple(skip + r.to(skip.dtype) for skip, r in zip(skips, residuals, strict=True))}
        if (added := now.mid) is not None:
            mid, now.mid = kwargs["hidden_states"], None
            kwargs["hidden_states"] = mid + added.to(mid.dtype)
        return args, kwargs


@contextmanager
def answered(unet: Any, answer: Answer) -> Iterator[None]:
    """Within the block, every call of `unet` is corrected by `answer`."""
    hooks = HostHooks(unet, answer)
    try:
        yield
    finally:
        hooks.hooks.remove()


def patched_prediction(
    host: Host,
    patch: nn.Module,
    noisy: Tensor,
    timesteps: Tensor,
    conditioning: Conditioning,
    instruction: Tensor,
) -> Tensor:
    """The host's prediction with the patch at scale 1, (B, 4, h, w), float32.

    Args:
        host: the frozen model.
        patch: a `Patch`, or one that a distributed trainer has wrapped.
        noisy: latents, (B, 4, h, w).
        timesteps: integer, (B,).
        conditioning: of B prompts.
        instruction: text states of the safety instruction, (1, tokens, width).
    """
    inner = getattr(patch, "module", patch)
    if isinstance(inner, TextPatch):
        return host.predict(noisy, timesteps, patched_conditioning(host.components, patch, conditioning))
    if isinstance(inner, LoraPatch):
        return patch(host.unet, lambda: host.predict(noisy, timesteps, conditioning))
    sample, times = host.shown(noisy, timesteps)
    if isinstance(inner, TokenLitePatch):
        told = Told(times, conditioning.states, instruction)
        return patch(host.unet, lambda: host.predict(noisy, timesteps, conditioning), told)
    dtype = next(inner.parameters()).dtype
    conditions = {name: value.to(dtype) for name, value in host.conditions(conditioning).items()}
    inputs = (sample.to(dtype), times, conditioning.states.to(dtype), instruction.to(dtype), conditions)
    if not cast(ResidualPatch, inner).reads_features:
        return host.predict(noisy, timesteps, conditioning, patch(*inputs))
    with answered(host.unet, lambda features: patch(*inputs, features=features.to(dtype))):
        return host.predict(noisy, timesteps, conditioning)

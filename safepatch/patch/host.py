"""How a patch that reads the host's own features meets its host: hooks that take them and add its residuals.

The residual arguments of a UNet are passed before its encoder has run, too early for an answer to what it makes. So the
features are taken where they are made, and the residuals go in where the decoder's blocks pick the skips up; the
encoder's own path is left alone, as ControlNet leaves it (Zhang et al. 2023, arXiv 2302.05543, figure 3).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

from safepatch.diffusion import Conditioning, UNetHost
from safepatch.patch.base import Features, ResidualPatch, Residuals
from safepatch.patch.lora import LoraPatch

Answer = Callable[[Features], Residuals | None]
SKIPS = "res_hidden_states_tuple"


class HostHooks:
    """Hooks on a UNet that show its features to `answer` and add the residuals it returns, if any.

    The features are the host's own, whatever ControlNets and other patches add to them: several such hooks on one
    UNet see the same, and their residuals add up.
    """

    def __init__(self, unet: Any, answer: Answer) -> None:
        self._answer = answer
        self._skips: list[Tensor] = []
        self._down: tuple[Tensor, ...] = ()  # what is still to be added, the decoder's next last
        self._mid: Tensor | None = None
        self._asked = False
        self._hooks = [
            unet.conv_in.register_forward_hook(self._begin),
            *(block.register_forward_hook(self._collect) for block in unet.down_blocks),
            unet.mid_block.register_forward_hook(self._ask),
            *(block.register_forward_pre_hook(self._add, with_kwargs=True) for block in unet.up_blocks),
        ]

    @property
    def is_done(self) -> bool:
        """Whether, since the UNet's call began, `answer` was asked and all it returned was added."""
        return self._asked and not self._down and self._mid is None

    def remove(self) -> None:
        """Take the hooks off; calling it twice is harmless."""
        while self._hooks:
            self._hooks.pop().remove()

    def _begin(self, _: nn.Module, args: tuple, output: Tensor) -> None:
        self._skips, self._down, self._mid = [output], (), None  # a call that failed leaves nothing to the next
        self._asked = False

    def _collect(self, _: nn.Module, args: tuple, output: tuple[Tensor, tuple[Tensor, ...]]) -> None:
        self._skips.extend(output[1])

    def _ask(self, _: nn.Module, args: tuple, output: Tensor) -> None:
        features, self._skips = Features(tuple(self._skips), output), []
        self._asked = True
        self._expect(self._answer(features))

    def _expect(self, residuals: Residuals | None) -> None:
        """The decoder's blocks are to add these."""
        if residuals is not None:
            self._down, self._mid = residuals

    def _add(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        skips = kwargs[SKIPS]
        if not self._down or self._down[-1].shape != skips[-1].shape:  # another block's hook is lost: see is_done
            return None
        residuals, self._down = self._down[-len(skips) :], self._down[: -len(skips)]
        kwargs = {**kwargs, SKIPS: tuple(skip + r.to(skip.dtype) for skip, r in zip(skips, residuals, strict=True))}
        if (added := self._mid) is not None:
            mid, self._mid = kwargs["hidden_states"], None
            kwargs["hidden_states"] = mid + added.to(mid.dtype)
        return args, kwargs


@contextmanager
def answered(unet: Any, answer: Answer) -> Iterator[None]:
    """Within the block, every call of `unet` is corrected by `answer`."""
    hooks = HostHooks(unet, answer)
    try:
        yield
    finally:
        hooks.remove()


def patched_prediction(
    host: UNetHost,
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
    if isinstance(inner, LoraPatch):
        return patch(host.unet, lambda: host.predict(noisy, timesteps, conditioning))
    dtype = next(inner.parameters()).dtype
    conditions = {name: value.to(dtype) for name, value in host.conditions(conditioning).items()}
    inputs = (noisy.to(dtype), timesteps, conditioning.states.to(dtype), instruction.to(dtype), conditions)
    if not cast(ResidualPatch, inner).reads_features:
        return host.predict(noisy, timesteps, conditioning, patch(*inputs))
    with answered(host.unet, lambda features: patch(*inputs, features=features.to(dtype))):
        return host.predict(noisy, timesteps, conditioning)

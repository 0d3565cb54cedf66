"""One call of ComfyUI's UNet by a patch that computes residuals: what it has made so far, and what is to be added."""

from functools import reduce
from typing import Any

from torch import Tensor, nn

from safepatch.errors import PatchBypassed
from safepatch.patch import Features, Residuals
from safepatch.patch.base import plus
from safepatch.runtime.call import Begun
from safepatch.runtime.corrector import Corrector

from .rows import Rows


class Skips:
    """Takes the skips and the mid block's output where they are made, and adds residuals where the decoder takes them.

    ComfyUI's own places for that: `input_block_patch`, and `output_block_patch`, in front of other nodes' as a patch
    comes in front of what diffusers does to skips.

    Args:
        corrector: of the patch.
        begun: the call, of the rows to correct alone.
        rows: which of the call's rows those are.
    """

    def __init__(self, corrector: Corrector, begun: Begun, rows: Rows) -> None:
        self._corrector, self._begun, self._rows = corrector, begun, rows
        self._early = corrector.early(begun)
        self._made: list[Tensor] = []
        self._down: tuple[Tensor, ...] = ()
        self._mid: Tensor | None = None
        self._is_asked = False

    def patches(self, others: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """ComfyUI's table of patches with these among those of others."""
        mine = {"input_block_patch": self._keep, "output_block_patch": self._add}
        return {**others, **{name: [patch, *others.get(name, [])] for name, patch in mine.items()}}

    def ask(self, _: nn.Module, args: tuple, mid: Tensor) -> None:
        """The mid block has made `mid`; what is to be added to it and to the skips."""
        self._is_asked = True
        features = Features(tuple(skip[self._rows] for skip in self._made), mid[self._rows])
        made = [each for each in (self._early, self._corrector.late(self._begun, features)) if each is not None]
        if made:
            total: Residuals = reduce(plus, made)
            self._down, self._mid = total.down, total.mid

    def end(self) -> None:
        """The call has ended; raise `PatchBypassed` if it did not take up what was to be added."""
        if not self._is_asked or self._down or self._mid is not None:
            raise PatchBypassed("the UNet ran without its patch: another node stands in for its mid block or its skips")

    def _keep(self, hidden: Tensor, options: dict[str, Any]) -> Tensor:
        self._made.append(hidden)
        return hidden

    def _add(self, hidden: Tensor, skip: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        if self._mid is not None:
            hidden, self._mid = self._sum(hidden, self._mid), None
        if self._down:
            skip, self._down = self._sum(skip, self._down[-1]), self._down[:-1]
        return hidden, skip

    def _sum(self, feature: Tensor, residual: Tensor) -> Tensor:
        """The feature with the residual on the rows to correct; all others keep their bits."""
        if feature.shape[2:] != residual.shape[2:]:
            raise PatchBypassed("another node changes the size of what the UNet's decoder takes up; take it off")
        feature = feature.clone()
        feature[self._rows] += residual.to(feature.dtype)
        return feature

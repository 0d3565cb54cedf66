"""What a patch adds to a call of a transformer, whose blocks take residuals as arguments."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from safepatch.diffusion import host_kind
from safepatch.patch import Residuals


class Handed(list[Tensor]):
    """Residuals handed to a transformer, which know whether it took them: a wrapper may drop arguments unnoticed."""

    is_taken = False

    def __getitem__(self, index: Any) -> Any:
        """As a list's, noted down."""
        self.is_taken = True
        return super().__getitem__(index)


def padded(residual: Tensor, rows: slice, sample: Tensor) -> Tensor:
    """The residual in the sample's dtype, with zeros for the rows before `rows`."""
    residual = residual.to(sample.dtype)
    if len(residual) == len(sample):
        return residual
    return torch.cat((residual.new_zeros(rows.start, *residual.shape[1:]), residual))


def with_residuals(residuals: Residuals, host: Any, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of a transformer with ours added to what a ControlNet or another patch put there."""
    kind, blocks = host_kind(host), len(host.transformer_blocks)
    given = kind.bind(args, kwargs)
    ours, theirs = kind.spread((*residuals.down, residuals.mid), blocks), given.get(kind.residuals)
    if theirs is None:
        return {**given, kind.residuals: Handed(ours)}
    if given.pop("controlnet_blocks_repeat", False):  # XLabs' ControlNets for Flux go round
        theirs = [theirs[i % len(theirs)] for i in range(blocks)]
    return {**given, kind.residuals: Handed(a + b for a, b in zip(ours, kind.spread(theirs, blocks), strict=True))}

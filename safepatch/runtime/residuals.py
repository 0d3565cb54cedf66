"""What a patch adds to a call of a transformer, whose blocks take residuals as arguments."""

import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safepatch.diffusion import host_kind
from safepatch.patch import Residuals

_COPYING = threading.local()  # whose residuals this thread has just gone through


@dataclass
class Taking:
    """Whether a transformer took the residuals that were handed to it in one call."""

    is_done: bool = False


class Handed(list[Tensor]):
    """Residuals handed to a transformer, which note down that they are taken: a wrapper may drop arguments unnoticed.

    Offloading, which moves arguments to a device, hands on a list of this kind made of this one.

    Attributes:
        taking: where it is noted down.
    """

    def __init__(self, residuals: Iterable[Tensor]) -> None:
        _COPYING.taking = None
        super().__init__(residuals)
        self.taking: Taking = _COPYING.taking or Taking()

    def __iter__(self) -> Iterator[Tensor]:
        """As a list's; what is made of it meanwhile is a copy."""
        _COPYING.taking = self.taking
        yield from super().__iter__()

    def __getitem__(self, index: Any) -> Any:
        """As a list's, noted down."""
        self.taking.is_done = True
        return super().__getitem__(index)


def padded(residual: Tensor, rows: slice, sample: Tensor) -> Tensor:
    """The residual in the sample's dtype, with zeros for the rows before `rows`."""
    residual = residual.to(sample.dtype)
    if len(residual) == len(sample):
        return residual
    return torch.cat((residual.new_zeros(rows.start, *residual.shape[1:]), residual))


def with_residuals(
    residuals: Residuals, host: Any, args: tuple, kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], Taking]:
    """The arguments of a call of a transformer with ours added to what a ControlNet or another patch put there.

    Returns:
        The arguments, and where it is noted down that the transformer takes them.
    """
    kind, blocks = host_kind(host), len(host.transformer_blocks)
    given = kind.bind(args, kwargs)
    ours, theirs = kind.spread((*residuals.down, residuals.mid), blocks), given.get(kind.residuals)
    if theirs is not None:
        if given.pop("controlnet_blocks_repeat", False):  # XLabs' ControlNets for Flux go round
            theirs = [theirs[i % len(theirs)] for i in range(blocks)]
        ours = [a + b for a, b in zip(ours, kind.spread(theirs, blocks), strict=True)]
    handed = Handed(ours)
    return {**given, kind.residuals: handed}, handed.taking

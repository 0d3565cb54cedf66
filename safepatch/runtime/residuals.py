"""What goes into a UNet call and what a patch adds to it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from safepatch.errors import ConfigError
from safepatch.patch import Residuals

DOWN, MID = "down_block_additional_residuals", "mid_block_additional_residual"


def bind(args: tuple, kwargs: Mapping[str, Any]) -> tuple[Tensor, Any, Tensor]:
    """sample, timestep and encoder_hidden_states of a UNet call, given by position or by name."""
    names = ("sample", "timestep", "encoder_hidden_states")
    given = dict(zip(names, args, strict=False))
    return tuple(given[name] if name in given else kwargs[name] for name in names)  # type: ignore[return-value]


def plus(left: Residuals, right: Residuals) -> Residuals:
    """The sum of two patches' residuals."""
    return Residuals(tuple(a + b for a, b in zip(left.down, right.down, strict=True)), left.mid + right.mid)


def padded(residual: Tensor, rows: slice, sample: Tensor) -> Tensor:
    """The residual in the sample's dtype, with zeros for the rows before `rows`."""
    residual = residual.to(sample.dtype)
    if len(residual) == len(sample):
        return residual
    return torch.cat((residual.new_zeros(rows.start, *residual.shape[1:]), residual))


def with_residuals(residuals: Residuals, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The host's residual arguments: ours added to whatever a ControlNet or another patch put there."""
    down, mid = kwargs.get(DOWN), kwargs.get(MID)
    if down is not None and len(down) != len(residuals.down):
        raise ConfigError(f"the pipeline passes {len(down)} skip residuals, the patch makes {len(residuals.down)}")
    return {
        DOWN: residuals.down if down is None else tuple(a + b for a, b in zip(down, residuals.down, strict=True)),
        MID: residuals.mid if mid is None else mid + residuals.mid,
    }

"""What goes into a UNet call and what a patch adds to it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safepatch.errors import ConfigError
from safepatch.patch import Residuals

DOWN, MID = "down_block_additional_residuals", "mid_block_additional_residual"


class Call(NamedTuple):
    """One call of the UNet, as far as a patch is concerned with it.

    Attributes:
        sample: noisy latents, (B, >= 4, h, w).
        timesteps: int, float, 0-d or (B,).
        prompt_states: text states, (B, tokens, width).
        added_cond_kwargs: SDXL's extra conditions; empty for others.
        rows: those to correct.
    """

    sample: Tensor
    timesteps: Any
    prompt_states: Tensor
    added_cond_kwargs: Mapping[str, Tensor]
    rows: slice

    @property
    def timestep(self) -> float:
        """Of the first row."""
        return float(torch.as_tensor(self.timesteps).flatten()[0])


class Cached(NamedTuple):
    """Residuals that a control patch made, and the calls they were used for.

    Attributes:
        residuals: as they were handed to the host.
        shape: of the sample.
        rows: those that were corrected.
        states: the rows' text states.
        timestep: of the last call.
        uses: how many calls they were used for.
        is_tiled: whether the UNet was called more than once at a timestep, for instance tile by tile.
    """

    residuals: Residuals
    shape: torch.Size
    rows: slice
    states: Tensor
    timestep: float
    uses: int = 1
    is_tiled: bool = False

    def serves(self, call: Call) -> bool:
        """Whether `call` is a later step of the same denoising."""
        alike = (self.shape, self.rows, self.states.device) == (call.sample.shape, call.rows, call.prompt_states.device)
        later = alike and call.timestep < self.timestep and not self.is_tiled
        return later and torch.equal(self.states, call.prompt_states)

    def shows_tiles(self, call: Call) -> bool:
        """Whether `call` is one more at the same timestep, or follows such calls within the same denoising."""
        return call.timestep == self.timestep or (self.is_tiled and call.timestep < self.timestep)


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

"""What goes into a call of the host and what a patch adds to it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safepatch.diffusion import UNET, HostKind, host_kind
from safepatch.errors import ConfigError
from safepatch.patch import Residuals
from safepatch.patch.base import row_timesteps

DOWN, MID = "down_block_additional_residuals", "mid_block_additional_residual"


class Call(NamedTuple):
    """One call of the host, as far as a patch is concerned with it.

    Attributes:
        sample: noisy latents, (B, >= 4, h, w), or as Flux packs them, (B, tokens, >= 64).
        timesteps: int, float, 0-d or (B,).
        prompt_states: text states, (B, tokens, width).
        conditions: what else the host is told of each row, by name, e.g. SDXL's `text_embeds`; each (B, ...).
        shared: what it is told of all rows at once.
        rows: those to correct.
    """

    sample: Tensor
    timesteps: Any
    prompt_states: Tensor
    conditions: Mapping[str, Tensor]
    shared: Mapping[str, Tensor]
    rows: slice

    @classmethod
    def of(cls, kind: HostKind, args: tuple, kwargs: Mapping[str, Any]) -> "Call":
        """The call with these arguments, all rows of it."""
        given = kind.bind(args, kwargs)
        sample, timesteps, states = (given[name] for name in (kind.sample, kind.timestep, kind.states))
        given |= given.get("added_cond_kwargs") or {}  # a UNet's conditions are in there
        conditions, shared = (
            {name: given[name] for name in names if isinstance(given.get(name), Tensor)}
            for names in (kind.conditions, kind.shared)
        )
        return cls(sample, timesteps, states, conditions, shared, slice(0, len(sample)))

    @property
    def row_timesteps(self) -> Tensor:
        """Those of the rows to correct, (B,)."""
        return row_timesteps(self.timesteps, self.sample)[self.rows]

    @property
    def timestep(self) -> float:
        """Of the first row."""
        return float(torch.as_tensor(self.timesteps).flatten()[0])


class Cached(NamedTuple):
    """Residuals that a control patch made, and the calls they were used for.

    Attributes:
        residuals: as they were handed to the host; None where a gate was closed.
        shape: of the sample.
        rows: those that were corrected.
        states: the rows' text states.
        timestep: of the last call.
        uses: how many calls they were used for.
        is_tiled: whether the UNet was called more than once at a timestep, for instance tile by tile.
    """

    residuals: Residuals | None
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
        return later and self.residuals is not None and torch.equal(self.states, call.prompt_states)

    def shows_tiles(self, call: Call) -> bool:
        """Whether `call` is one more at the same timestep, or follows such calls within the same denoising."""
        return call.timestep == self.timestep or (self.is_tiled and call.timestep < self.timestep)


def plus(left: Residuals, right: Residuals) -> Residuals:
    """The sum of two patches' residuals."""
    return Residuals(tuple(a + b for a, b in zip(left.down, right.down, strict=True)), left.mid + right.mid)


def padded(residual: Tensor, rows: slice, sample: Tensor) -> Tensor:
    """The residual in the sample's dtype, with zeros for the rows before `rows`."""
    residual = residual.to(sample.dtype)
    if len(residual) == len(sample):
        return residual
    return torch.cat((residual.new_zeros(rows.start, *residual.shape[1:]), residual))


def with_residuals(residuals: Residuals, host: Any, args: tuple, kwargs: Mapping[str, Any]) -> tuple[tuple, dict]:
    """The arguments of a call of `host` with our residuals added to what a ControlNet or another patch put there."""
    kind = host_kind(host)
    given = kind.bind(args, kwargs)
    if kind is UNET:
        return (), {**given, **_for_unet(residuals, given)}
    return (), _for_transformer(residuals, kind, len(host.transformer_blocks), given)


def _for_unet(residuals: Residuals, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    down, mid = kwargs.get(DOWN), kwargs.get(MID)
    if down is not None and len(down) != len(residuals.down):
        raise ConfigError(f"the pipeline passes {len(down)} skip residuals, the patch makes {len(residuals.down)}")
    return {
        DOWN: residuals.down if down is None else tuple(a + b for a, b in zip(down, residuals.down, strict=True)),
        MID: residuals.mid if mid is None else mid + residuals.mid,
    }


def _for_transformer(residuals: Residuals, kind: HostKind, blocks: int, given: dict[str, Any]) -> dict[str, Any]:
    ours, theirs = kind.spread((*residuals.down, residuals.mid), blocks), given.get(kind.residuals)
    if theirs is None:
        return {**given, kind.residuals: ours}
    if given.pop("controlnet_blocks_repeat", False):  # XLabs' ControlNets for Flux go round
        theirs = [theirs[i % len(theirs)] for i in range(blocks)]
    return {**given, kind.residuals: [a + b for a, b in zip(ours, kind.spread(theirs, blocks), strict=True)]}

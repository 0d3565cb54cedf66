"""The lite patch: small corrections of the host's own skip and mid features; no second encoder.

Every feature goes through a narrow branch of its own: affine-free group norm, 1 x 1 down to `rank` channels, a read of
the text (cross-attention) and of what the mid block's branch has found there, a modulation by timestep and instruction
(FiLM; Perez et al. 2018, arXiv 1709.07871), 3 x 3 convolutions, and a zero-initialised 1 x 1 back up, as an adapter
(Houlsby et al. 2019, arXiv 1902.00751). So the first skips, whose features say little, are told what is drawn where.

The first dimension of every parameter is the group, one group per category: merging lite patches is concatenation along
it, and the merged patch computes the sum of its groups' corrections in one pass.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, group_norm, interpolate, scaled_dot_product_attention, silu
from torch.utils.checkpoint import checkpoint

from safepatch.errors import ConfigError
from safepatch.patch.base import Features, ResidualPatch, Residuals, require_unet, row_timesteps
from safepatch.patch.clone import SEES
from safepatch.patch.control import skip_channels
from safepatch.patch.draw import TIME_WIDTH, Draw, sinusoids

CONDITION_WIDTH = 64


class LitePatch(ResidualPatch):
    """One narrow branch per skip connection and one for the mid block.

    Args:
        channels: channels of each skip connection, in encoder order, and last of the mid block.
        text_width: of the host's text states.
        norm_groups: groups of the host's group norms.
        sees: `instruction`, or `instruction+prompt`; the prompt also reaches the patch through the features.
        rank: channels of a branch and group.
        depth: 3 x 3 convolutions per branch.
        groups: categories.
    """

    kind = "lite"
    reads_features = True
    learning_rate = 2e-4
    joint_rate = 1.0

    def __init__(
        self,
        channels: Sequence[int],
        text_width: int,
        norm_groups: int,
        sees: str,
        rank: int = 64,
        depth: int = 1,
        groups: int = 1,
    ) -> None:
        super().__init__()
        if sees not in SEES:
            raise ConfigError(f"a lite patch cannot see '{sees}'; choose one of: {', '.join(SEES)}")
        if min(rank, depth, groups) < 1:
            raise ConfigError(f"a lite patch needs rank, depth and groups of at least 1, not {rank}, {depth}, {groups}")
        self.sees = sees
        self.layout = {"rank": rank, "depth": depth, "groups": groups}
        draw = Draw(seed=0)
        self.time = draw.normal(groups, CONDITION_WIDTH, TIME_WIDTH)
        self.instruction = draw.normal(groups, CONDITION_WIDTH, text_width)
        self.key = draw.normal(groups, rank, text_width)
        self.value = draw.normal(groups, rank, text_width)
        sizes = (norm_groups, rank, depth, groups)
        self.down_branches = nn.ModuleList(_Branch(draw, width, *sizes) for width in channels[:-1])
        self.mid_branch = _Branch(draw, channels[-1], *sizes, is_told=False)

    @classmethod
    def ungated(cls, unet: Any, sees: str, empty: bool, **layout: Any) -> "LitePatch":
        """A fresh patch, whose random values are the same every time (a few MB, made even if `empty`)."""
        require_unet(unet, "a lite patch")
        width, norm_groups = unet.config["cross_attention_dim"], unet.config["norm_num_groups"]
        return cls(skip_channels(unet), width, norm_groups, sees, **layout)

    def forward(
        self,
        sample: Tensor,
        timesteps: Tensor,
        prompt_states: Tensor,
        instruction_states: Tensor,
        conditions: Mapping[str, Tensor] | None = None,
        features: Features | None = None,
        scales: Tensor | None = None,
    ) -> Residuals:
        """Residuals of shape (B, C_i, h_i, w_i) for every skip, and for the mid block; needs `features`."""
        if features is None:
            raise ConfigError("a lite patch reads the host's features; none were passed")
        text = self._read(prompt_states, instruction_states)
        condition = self._condition(row_timesteps(timesteps, sample), instruction_states)
        mid, found = self._run(self.mid_branch, features.mid, condition, *text, scales)
        down = zip(self.down_branches, features.down, strict=True)
        made = [self._run(branch, skip, condition, *text, scales, found) for branch, skip in down]
        return Residuals(tuple(residual for residual, _ in made), mid)

    def joints(self) -> list[nn.Parameter]:
        """The branches' last convolutions."""
        return [branch.up for branch in (*self.down_branches, self.mid_branch)]  # type: ignore[misc]

    def anchors(self, unet: Any) -> dict[str, Tensor]:
        """Zeros: nothing of a lite patch is the host's."""
        return {name: torch.zeros_like(p) for name, p in self.named_parameters()}

    def _read(self, prompt_states: Tensor, instruction_states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the text, each (B, groups, tokens, rank)."""
        rows, groups = len(prompt_states), self.layout["groups"]
        text = self._instructions(instruction_states).expand(rows, -1, -1, -1)
        if self.sees != "instruction":
            prompt = prompt_states.unsqueeze(1).expand(-1, groups, -1, -1)
            text = torch.cat((text, prompt), dim=2)
        return tuple(torch.einsum("bgtw,grw->bgtr", text, part) for part in (self.key, self.value))  # type: ignore

    def _condition(self, timesteps: Tensor, instruction_states: Tensor) -> Tensor:
        """What modulates the branches, (B, groups, CONDITION_WIDTH)."""
        time = torch.einsum("bt,gct->bgc", sinusoids(timesteps).to(self.time.dtype), self.time)
        instruction = self._instructions(instruction_states).mean(2)
        return silu(time + torch.einsum("bgw,gcw->bgc", instruction, self.instruction))

    def _instructions(self, instruction_states: Tensor) -> Tensor:
        """(1 or B, groups * tokens, width) side by side as (1 or B, groups, tokens, width)."""
        return instruction_states.unflatten(1, (self.layout["groups"], -1))

    def _run(self, branch: nn.Module, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(branch, *inputs, use_reentrant=False)
        return branch(*inputs)


class _Branch(nn.Module):
    """The correction of one feature, (B, channels, h, w) -> the same, and what was found; all groups at once.

    A branch `is_told` what the mid block's has found, `above`; that of the mid block is not.
    """

    def __init__(
        self, draw: Draw, channels: int, norm_groups: int, rank: int, depth: int, groups: int, is_told: bool = True
    ) -> None:
        super().__init__()
        self.norm_groups, self.groups = norm_groups, groups
        self.down = draw.normal(groups, rank, channels)
        self.query = draw.normal(groups, rank, rank)
        with torch.no_grad():
            self.query /= math.sqrt(rank)  # the usual scale of attention, kept out of it so that zeros may be added
        self.out = draw.normal(groups, rank, rank)
        self.film = nn.Parameter(torch.zeros(groups, 2, rank, CONDITION_WIDTH))
        self.mix = nn.ParameterList(draw.normal(groups, rank, rank, 3, 3) for _ in range(depth))
        self.up = nn.Parameter(torch.zeros(groups, channels, rank))
        self.told = nn.Parameter(torch.zeros(groups, rank, rank)) if is_told else None

    def forward(
        self,
        feature: Tensor,
        condition: Tensor,
        key: Tensor,
        value: Tensor,
        scales: Tensor | None = None,
        above: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        hidden = group_norm(feature.contiguous(), self.norm_groups)
        hidden = conv2d(hidden, self.down.flatten(0, 1)[..., None, None])
        hidden = hidden + self._attend(hidden, key, value)
        if above is not None and self.told is not None:
            told = conv2d(above, self.told.flatten(0, 1)[..., None, None], groups=self.groups)
            hidden = hidden + interpolate(told, hidden.shape[-2:])
        scale, shift = torch.einsum("bgc,gdrc->dbgr", condition, self.film)
        hidden = silu(hidden * (1 + scale.flatten(1)[..., None, None]) + shift.flatten(1)[..., None, None])
        for mix in self.mix:
            hidden = silu(conv2d(hidden, mix.flatten(0, 1), padding=1, groups=self.groups))
        found = hidden
        if scales is not None:
            hidden = (hidden.unflatten(1, (self.groups, -1)) * scales[..., None, None, None]).flatten(1, 2)
        return conv2d(hidden, self.up.transpose(0, 1).flatten(1)[..., None, None]), found

    def _attend(self, hidden: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """What each position reads of the text, shaped as `hidden`, (B, groups * rank, h, w)."""
        positions = hidden.unflatten(1, (self.groups, -1)).flatten(3).transpose(2, 3)
        query = torch.einsum("bgpr,gsr->bgps", positions, self.query)
        read = torch.einsum("bgpr,gsr->bgsp", scaled_dot_product_attention(query, key, value, scale=1.0), self.out)
        return read.reshape(hidden.shape)

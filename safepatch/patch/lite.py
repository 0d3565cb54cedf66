"""The lite patch: small corrections of the host's own skip and mid features; no second encoder.

Every feature goes through a narrow branch of its own (`safepatch.patch.narrow`), behind an affine-free group norm, with
3 x 3 convolutions for maps; and each reads what the mid block's branch has found there. So the first skips, whose
features say little, are told what is drawn where.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, group_norm, interpolate, silu
from torch.utils.checkpoint import checkpoint

from safepatch.diffusion import UNET, host_kind, text_width
from safepatch.errors import ConfigError
from safepatch.patch.base import Features, ResidualPatch, Residuals, row_timesteps
from safepatch.patch.control import skip_channels
from safepatch.patch.draw import Draw
from safepatch.patch.lite_tokens import TokenLitePatch
from safepatch.patch.narrow import NarrowBranch, NarrowPatch


class LitePatch(NarrowPatch, ResidualPatch):
    """One narrow branch per skip connection and one for the mid block, or, of a transformer, one per joint block.

    Args:
        channels: channels of each skip connection, in encoder order, and last of the mid block.
        text_width: of the host's text states.
        norm_groups: groups of the host's group norms.
        sees: `instruction`, or `instruction+prompt`; the prompt also reaches the patch through the features.
        rank: channels of a branch and group.
        depth: 3 x 3 convolutions per branch.
        groups: categories.
    """

    reads_features = True

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
        draw = Draw(seed=0)
        super().__init__(draw, text_width, sees, {"rank": rank, "depth": depth, "groups": groups})
        sizes = (norm_groups, self.layout)
        self.down_branches = nn.ModuleList(_Branch(draw, width, *sizes) for width in channels[:-1])
        self.mid_branch = _Branch(draw, channels[-1], *sizes, is_told=False)

    @classmethod
    def ungated(cls, unet: Any, sees: str, empty: bool, **layout: Any) -> Any:
        """A fresh patch, whose random values are the same every time (a few MB, made even if `empty`).

        For a transformer it is a `TokenLitePatch`.
        """
        if host_kind(unet) is not UNET:
            return TokenLitePatch.ungated(unet, sees, empty, **layout)
        width, norm_groups = text_width(unet), unet.config["norm_num_groups"]
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
        text = self.text(prompt_states, instruction_states)
        condition = self.condition(row_timesteps(timesteps, sample), instruction_states)
        mid, found = self._run(self.mid_branch, features.mid, condition, *text, scales)
        down = zip(self.down_branches, features.down, strict=True)
        made = [self._run(branch, skip, condition, *text, scales, found) for branch, skip in down]
        return Residuals(tuple(residual for residual, _ in made), mid)

    def joints(self) -> list[nn.Parameter]:
        """The branches' last convolutions."""
        return [branch.up for branch in (*self.down_branches, self.mid_branch)]  # type: ignore[misc]

    def _run(self, branch: nn.Module, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(branch, *inputs, use_reentrant=False)
        return branch(*inputs)


class _Branch(NarrowBranch):
    """The correction of one feature, (B, channels, h, w) -> the same, and what was found; all groups at once.

    A branch `is_told` what the mid block's has found, `above`; that of the mid block is not.
    """

    def __init__(
        self, draw: Draw, channels: int, norm_groups: int, layout: dict[str, int], is_told: bool = True
    ) -> None:
        super().__init__(draw, channels, layout, kernel=(3, 3))
        rank, groups = layout["rank"], layout["groups"]
        self.norm_groups = norm_groups
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
        scale, shift = self.modulation(condition)
        hidden = silu(hidden * (1 + scale.flatten(1)[..., None, None]) + shift.flatten(1)[..., None, None])
        for mix in self.mix:
            hidden = silu(conv2d(hidden, mix.flatten(0, 1), padding=1, groups=self.groups))
        found = hidden
        if scales is not None:
            hidden = (hidden.unflatten(1, (self.groups, -1)) * scales[..., None, None, None]).flatten(1, 2)
        return conv2d(hidden, self.up.transpose(0, 1).flatten(1)[..., None, None]), found

    def _attend(self, hidden: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """What each position reads of the text, shaped as `hidden`, (B, groups * rank, h, w)."""
        places = hidden.unflatten(1, (self.groups, -1)).flatten(3).transpose(2, 3)
        return self.attend(places, key, value, to="bgsp").reshape(hidden.shape)

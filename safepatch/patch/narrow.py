"""What the lite patches of UNets and of transformers share: narrow branches, and what these read beside a feature.

A branch is a narrow way beside the host (as an adapter's; Houlsby et al. 2019, arXiv 1902.00751): down to `rank`
channels, a read of the text (cross-attention), a modulation by timestep and instruction (FiLM; Perez et al. 2018, arXiv
1709.07871), a few maps of its own, and zero-initialised up again.

The first dimension of every parameter is the group, one group per category: merging lite patches is concatenation along
it, and the merged patch computes the sum of its groups' corrections in one pass.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from safepatch.errors import ConfigError
from safepatch.patch.base import Patch
from safepatch.patch.deltas import Anchored
from safepatch.patch.draw import TIME_WIDTH, Draw, sinusoids

CONDITION_WIDTH = 64
SEES = ("instruction", "instruction+prompt")


class NarrowPatch(Anchored, Patch):
    """What all branches of a lite patch read.

    Args:
        draw: what fresh weights come from.
        text_width: of the host's text states.
        sees: `instruction`, or `instruction+prompt`; the prompt also reaches the patch through the features.
        layout: `rank`, channels of a branch and group; `depth`, maps of its own in each branch; `groups`, categories.
    """

    kind = "lite"
    learning_rate = 2e-4
    joint_rate = 1.0

    def __init__(self, draw: Draw, text_width: int, sees: str, layout: dict[str, int]) -> None:
        super().__init__()
        rank, depth, groups = layout["rank"], layout["depth"], layout["groups"]
        if sees not in SEES:
            raise ConfigError(f"a lite patch cannot see '{sees}'; choose one of: {', '.join(SEES)}")
        if min(rank, depth, groups) < 1:
            raise ConfigError(f"a lite patch needs rank, depth and groups of at least 1, not {rank}, {depth}, {groups}")
        self.sees = sees
        self.layout = dict(layout)
        self.time = draw.normal(groups, CONDITION_WIDTH, TIME_WIDTH)
        self.instruction = draw.normal(groups, CONDITION_WIDTH, text_width)
        self.key = draw.normal(groups, rank, text_width)
        self.value = draw.normal(groups, rank, text_width)

    def anchors(self, unet: Any) -> dict[str, Tensor]:
        """Zeros: nothing of a lite patch is the host's."""
        return {name: torch.zeros_like(p) for name, p in self.named_parameters()}

    def text(self, prompt_states: Tensor, instruction_states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the text, each (B, groups, tokens, rank)."""
        rows, groups = len(prompt_states), self.layout["groups"]
        text = self._instructions(instruction_states).expand(rows, -1, -1, -1)
        if self.sees != "instruction":
            prompt = prompt_states.unsqueeze(1).expand(-1, groups, -1, -1)
            text = torch.cat((text, prompt), dim=2)
        return tuple(torch.einsum("bgtw,grw->bgtr", text, part) for part in (self.key, self.value))  # type: ignore

    def condition(self, timesteps: Tensor, instruction_states: Tensor) -> Tensor:
        """What modulates the branches, (B, groups, CONDITION_WIDTH)."""
        time = torch.einsum("bt,gct->bgc", sinusoids(timesteps).to(self.time.dtype), self.time)
        instruction = self._instructions(instruction_states).mean(2)
        return silu(time + torch.einsum("bgw,gcw->bgc", instruction, self.instruction))

    def _instructions(self, instruction_states: Tensor) -> Tensor:
        """(1 or B, groups * tokens, width) side by side as (1 or B, groups, tokens, width)."""
        return instruction_states.unflatten(1, (self.layout["groups"], -1))


class NarrowBranch(nn.Module):
    """The weights of the correction of one feature, all groups at once.

    Args:
        draw: what fresh weights come from.
        channels: of the feature.
        layout: of the patch.
        kernel: height and width of its own maps, where the feature has places beside each other.
    """

    def __init__(self, draw: Draw, channels: int, layout: dict[str, int], kernel: tuple[int, ...] = ()) -> None:
        super().__init__()
        rank, groups = layout["rank"], layout["groups"]
        self.groups = groups
        self.down = draw.normal(groups, rank, channels)
        self.query = draw.normal(groups, rank, rank)
        with torch.no_grad():
            self.query /= math.sqrt(rank)  # the usual scale of attention, kept out of it so that zeros may be added
        self.out = draw.normal(groups, rank, rank)
        self.film = nn.Parameter(torch.zeros(groups, 2, rank, CONDITION_WIDTH))
        self.mix = nn.ParameterList(draw.normal(groups, rank, rank, *kernel) for _ in range(layout["depth"]))
        self.up = nn.Parameter(torch.zeros(groups, channels, rank))

    def attend(self, places: Tensor, key: Tensor, value: Tensor, to: str) -> Tensor:
        """What each place, (B, groups, places, rank), reads of the text; `to` orders the dimensions, bgps here."""
        query = torch.einsum("bgpr,gsr->bgps", places, self.query)
        read = scaled_dot_product_attention(query, key, value, scale=1.0)
        return torch.einsum(f"bgpr,gsr->{to}", read, self.out)

    def modulation(self, condition: Tensor) -> Tensor:
        """Scale and shift of each channel, (2, B, groups, rank)."""
        return torch.einsum("bgc,gdrc->dbgr", condition, self.film)

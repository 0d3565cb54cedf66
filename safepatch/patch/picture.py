"""The second key of a gate: what the frozen host makes of what is being drawn, whatever the words say.

It reads the mid block's output at each step, which tells what a picture shows better than anything else of a UNet
(Kwon et al. 2023, arXiv 2210.10960, call it h-space). Of the places in a picture the most suspicious one counts, and of
the steps the mean of the last few: a single step's noise opens nothing.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import group_norm, silu

from safepatch.artifact.schema import KEYS
from safepatch.errors import ConfigError
from safepatch.patch.draw import TIME_WIDTH, Draw, sinusoids

TEXT = KEYS[0]
LOOKS = 3  # steps of which the mean counts


class PictureKey(nn.Module):
    """How much what is drawn is what a patch is for, per group: the log odds at one step.

    Args:
        channels: of the mid block's output.
        norm_groups: groups of the host's group norms.
        width: channels of the key itself.
        groups: categories; the first dimension of every parameter.
    """

    def __init__(self, channels: int, norm_groups: int, width: int, groups: int) -> None:
        super().__init__()
        if width < 1:
            raise ConfigError(f"a picture key needs a width of at least 1, not {width}")
        draw = Draw(seed=2)
        self.norm_groups = norm_groups
        self.look = draw.normal(groups, width, channels)
        self.time = draw.normal(groups, width, TIME_WIDTH)
        self.hidden = draw.normal(groups, width, width)
        self.hidden_bias = nn.Parameter(torch.zeros(groups, width))
        self.decide = nn.Parameter(torch.zeros(groups, width))
        self.bias = nn.Parameter(torch.zeros(groups))

    def forward(self, mid: Tensor, timesteps: Tensor) -> Tensor:
        """Logits (B, groups) of the mid block's output, (B, C, h, w), at `timesteps`, (B,)."""
        time = torch.einsum("bt,grt->bgr", sinusoids(timesteps), self.time)
        places = group_norm(mid.float(), self.norm_groups).flatten(2)
        seen = silu(torch.einsum("bcp,grc->bgrp", places, self.look) + time[..., None])
        hidden = silu(torch.einsum("bgrp,gsr->bgsp", seen, self.hidden) + self.hidden_bias[..., None])
        return torch.einsum("bgsp,gs->bgp", hidden, self.decide).amax(-1) + self.bias


def added_up(before: Tensor, logits: Tensor, looks: int | Tensor) -> Tensor:
    """The mean of the first `LOOKS` logits, later steps replacing earlier ones little by little.

    Args:
        before: what came of the steps before, of any shape.
        logits: of this step, likewise.
        looks: how many steps that makes with this one.
    """
    return before + (logits - before) / torch.as_tensor(looks, device=logits.device).clamp(max=LOOKS)

"""A gate decides, row by row and step by step, whether a patch acts at all; closed, the host's bits are untouched.

It reads the prompt through attention with learned queries, and what the host makes of it: the mid block's output.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import group_norm, scaled_dot_product_attention, silu

from safepatch.patch.draw import TIME_WIDTH, Draw, sinusoids

QUERIES = 4
MODES = ("off", "soft", "hard")


class Gate(nn.Module):
    """The probability, per group, that a row is one the patch is for.

    Args:
        channels: of the mid block's output.
        text_width: of the host's text states.
        norm_groups: groups of the host's group norms.
        width: channels of the gate itself.
        groups: categories; the first dimension of every parameter.
    """

    def __init__(self, channels: int, text_width: int, norm_groups: int, width: int, groups: int) -> None:
        super().__init__()
        draw = Draw(seed=1)
        self.norm_groups = norm_groups
        self.query = draw.normal(groups, QUERIES, width)
        self.key = draw.normal(groups, width, text_width)
        self.value = draw.normal(groups, width, text_width)
        self.look = draw.normal(groups, width, channels)
        self.time = draw.normal(groups, width, TIME_WIDTH)
        self.hidden = draw.normal(groups, width, (QUERIES + 2) * width)
        self.decide = nn.Parameter(torch.zeros(groups, width))
        self.bias = nn.Parameter(torch.zeros(groups))

    def forward(self, mid: Tensor, timesteps: Tensor, prompt_states: Tensor) -> Tensor:
        """Logits (B, groups); each row's depend on that row alone.

        Args:
            mid: the host's mid block's output, (B, C, h, w).
            timesteps: (B,).
            prompt_states: (B, tokens, width).
        """
        key, value = (torch.einsum("btw,grw->bgtr", prompt_states, part) for part in (self.key, self.value))
        query = self.query.expand(len(mid), -1, -1, -1)
        text = scaled_dot_product_attention(query, key, value).flatten(2)
        seen = silu(torch.einsum("bcp,grc->bgrp", group_norm(mid, self.norm_groups).flatten(2), self.look))
        read = torch.cat((text, seen.mean(-1), seen.amax(-1)), dim=-1)
        time = torch.einsum("bt,grt->bgr", sinusoids(timesteps).to(self.time.dtype), self.time)
        hidden = silu(torch.einsum("bgi,gri->bgr", read, self.hidden) + time)
        return torch.einsum("bgr,gr->bg", hidden, self.decide) + self.bias

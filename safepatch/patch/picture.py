"""The second key of a gate: what the frozen host makes of what is being drawn, whatever the words say.

It reads the mid block's output at each step, which tells what a picture shows (Kwon et al. 2023, arXiv 2210.10960, call
it h-space). Of the places in a picture the most suspicious one counts, and of the steps the mean of the last few: a
single step's noise opens nothing.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, silu

from safepatch.artifact.schema import KEYS
from safepatch.errors import ConfigError
from safepatch.patch.draw import TIME_WIDTH, Draw, sinusoids

TEXT = KEYS[0]
LOOKS = 3  # steps of which the mean counts


class PictureKey(nn.Module):
    """How much what is drawn is what a patch is for, per group: the log odds at one step.

    Args:
        channels: of the mid block's output.
        width: channels of the key itself.
        groups: categories; the first dimension of every parameter.
    """

    def __init__(self, channels: int, width: int, groups: int) -> None:
        super().__init__()
        if width < 1:
            raise ConfigError(f"a picture key needs a width of at least 1, not {width}")
        draw = Draw(seed=2)
        self.look = draw.normal(groups, width, channels)
        self.look_bias = nn.Parameter(torch.zeros(groups, width))
        self.time = nn.Parameter(torch.zeros(groups, width, TIME_WIDTH))
        self.decide = draw.normal(groups, width, 3, 3)
        self.bias = nn.Parameter(torch.zeros(groups))

    def forward(self, mid: Tensor, timesteps: Tensor) -> Tensor:
        """Logits (B, groups) of the mid block's output, (B, C, h, w), at `timesteps`, (B,)."""
        groups, time = len(self.bias), torch.einsum("bt,grt->bgr", sinusoids(timesteps), self.time)
        places = conv2d(mid.float(), self.look.flatten(0, 1)[..., None, None], self.look_bias.flatten())
        seen = silu(places + time.flatten(1)[..., None, None])
        return conv2d(seen, self.decide, self.bias, padding=1, groups=groups).flatten(2).amax(2)

    @torch.no_grad()
    def take_in(self, mean: Tensor, deviation: Tensor) -> None:
        """Look at channels as they are, instead of less their mean and over their standard deviation, (C,) each."""
        self.look /= deviation
        self.look_bias -= torch.einsum("grc,c->gr", self.look, mean)


def added_up(before: Tensor, logits: Tensor, looks: int | Tensor) -> Tensor:
    """The mean of the first `LOOKS` logits, later steps replacing earlier ones little by little.

    Args:
        before: what came of the steps before, of any shape.
        logits: of this step, likewise.
        looks: how many steps that makes with this one.
    """
    return before + (logits - before) / torch.as_tensor(looks, device=logits.device).clamp(max=LOOKS)

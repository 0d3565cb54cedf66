"""What the small networks of patches start from: weights drawn without touching the global generator, and sinusoids."""

import math

import torch
from torch import Tensor, nn

TIME_WIDTH = 128  # of the sinusoidal timestep embedding


class Draw:
    """Initial weights from a generator of their own; equal every time."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, groups: int, out: int, *inputs: int) -> nn.Parameter:
        """(groups, out, *inputs), of variance 1 / product of inputs; equal in every group."""
        one = torch.randn(out, *inputs, generator=self.generator) / math.sqrt(math.prod(inputs))
        return nn.Parameter(one.expand(groups, *one.shape).clone())


def sinusoids(timesteps: Tensor) -> Tensor:
    """Sinusoidal embedding (B, TIME_WIDTH) of timesteps (B,) (Vaswani et al. 2017, section 3.5)."""
    half = TIME_WIDTH // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=timesteps.device) / half)
    angles = timesteps.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)

"""The noisy latents that a loss is measured at: drawn from the turn's generator alone, whatever the objective."""

from typing import NamedTuple

import torch
from torch import Tensor

from safepatch.diffusion import Host, moved
from safepatch.objectives.base import Turn


class Noised(NamedTuple):
    """Latents with noise, each (B, 4, h, w), at integer timesteps (B,)."""

    noisy: Tensor
    timesteps: Tensor
    noise: Tensor


def noised(turn: Turn, latents: Tensor, power: float = 1.0, below: float = 1.0) -> Noised:
    """Clean `latents` (B, 4, h, w) with noise of the turn's own.

    Args:
        turn: whose generator and host; what it draws is a function of its (seed, step).
        latents: clean and scaled.
        power: of the timesteps' draw, see `draw_timesteps`.
        below: share of the schedule that timesteps are below, within (0, 1].
    """
    timesteps = draw_timesteps(len(latents), int(turn.host.steps * below), power, turn.generator)
    timesteps = moved(timesteps, latents.device)
    noise = moved(torch.randn(latents.shape, generator=turn.generator), latents.device)
    return Noised(turn.host.add_noise(latents, noise, timesteps), timesteps, noise)


def clean_weights(host: Host, timesteps: Tensor) -> Tensor:
    """The smaller of 1 and 1 / SNR at `timesteps` (B,), shape (B, 1, 1, 1).

    By them the squared error of a prediction that shall end at another picture counts as that of the clean picture
    where little is noise: there it is as far off as the picture is from its noise (Hang et al. 2023, arXiv 2303.09556,
    with gamma = 1).
    """
    one = torch.ones(len(timesteps), 1, 1, 1, device=timesteps.device)
    signal, sigma = (host.add_noise(*parts, timesteps) for parts in ((one, 0 * one), (0 * one, one)))
    return ((sigma / signal) ** 2).clamp(max=1)


def draw_timesteps(n: int, total: int, power: float, generator: torch.Generator) -> Tensor:
    """Integer timesteps (n,) below `total`, stratified over the schedule, in random order.

    Exponents below 1 of the uniform draw favour noisy ones, where it is decided what is drawn.
    """
    spread = ((torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)) / n) ** power
    return (spread * total).long().clamp(max=total - 1)  # float32 may round n - 1 + rand up to n

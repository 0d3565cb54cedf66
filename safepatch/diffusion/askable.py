"""What a pipeline can be asked for, told before gigabytes of weights are read: a device, steps, guidance, a seed."""

import math

import torch

from safepatch.errors import ConfigError

MOST_STEPS = 1000  # into which the models' own schedules cut the denoising
LEAST_SEED, SEEDS_END = -(1 << 63), 1 << 64  # what torch's generators take


def require_device(name: str, instead: str = "choose another --device") -> torch.device:
    """The device of that name; raises `ConfigError` where there is none, or nothing would be computed on it.

    Args:
        name: `cpu`, `cuda`, `cuda:1`, `mps` and so on.
        instead: what to do.
    """
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, ImportError) as error:  # the last where its own package is missing
        raise ConfigError(f"no device '{name}' here ({str(error).splitlines()[0][:120]}); {instead}") from None
    if device.type == "meta":
        raise ConfigError(f"no device '{name}' here (it holds shapes and no numbers); {instead}")
    return device


def require_drawable(steps: int, guidance_scale: float | None = None, seed: int = 0) -> None:
    """Raise `ConfigError` for what no image can be drawn with."""
    if not 1 <= steps <= MOST_STEPS:
        raise ConfigError(f"steps must be from 1 to {MOST_STEPS}, not {steps}")
    if guidance_scale is not None and not 0 <= guidance_scale < math.inf:
        raise ConfigError(f"guidance_scale must be a number of at least 0, not {guidance_scale:g}")
    if not LEAST_SEED <= seed < SEEDS_END:
        raise ConfigError(f"seed must be below 2^64 and at least -2^63, not {seed}")

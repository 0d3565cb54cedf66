"""Schedulers for a model that draws in one step: which can, and one that does from any timestep."""

import copy
from typing import Any

import torch
from diffusers import DDIMScheduler

from safepatch.diffusion.noise import alphas, prediction_type


def one_step_scheduler(scheduler: Any, timestep: int) -> DDIMScheduler:
    """One with the noise schedule of `scheduler` whose single step leads from `timestep` to a clean picture.

    Its schedule ends where the step begins, so that a pipeline need not be told of timesteps.
    """
    changes: dict[str, Any] = {"timestep_spacing": "trailing", "clip_sample": False, "thresholding": False}
    changes |= {"set_alpha_to_one": True, "num_train_timesteps": timestep + 1, "rescale_betas_zero_snr": False}
    changes |= {"trained_betas": scheduler.betas[: timestep + 1].tolist()}
    return DDIMScheduler.from_config(scheduler.config, **changes)


def draws_in_one_step(scheduler: Any, timestep: int) -> bool:
    """Whether a single step of it begins at `timestep` and ends at the clean latents that a prediction stands for."""
    tried = copy.deepcopy(scheduler)
    try:
        tried.set_timesteps(1)
    except (ValueError, IndexError):  # those of higher order need more
        return False
    if tried.timesteps.tolist() != [timestep]:
        return False
    noise, prediction = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    start, at = noise * tried.init_noise_sigma, tried.timesteps[0]
    asked = tried.scale_model_input(start, at)
    made = tried.step(prediction, at, start, return_dict=False)[0]
    return bool(torch.allclose(made, _clean(scheduler, asked, timestep, prediction), rtol=1e-2, atol=1e-2))


def _clean(scheduler: Any, noisy: torch.Tensor, timestep: int, prediction: torch.Tensor) -> torch.Tensor:
    signal, sigma = alphas(scheduler, torch.tensor([timestep]))
    kind = prediction_type(scheduler)
    if kind == "v_prediction":
        return signal * noisy - sigma * prediction
    return prediction if kind == "sample" else (noisy - sigma * prediction) / signal

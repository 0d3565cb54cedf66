"""A UNet's noise schedule: adding noise, predicting it, and what a prediction is compared with."""

from typing import Any

from diffusers import UNet2DConditionModel
from torch import Tensor

from safepatch.diffusion.conditioning import moved


def prediction_type(scheduler: object) -> str:
    """`epsilon`, `v_prediction` or `sample`."""
    return scheduler.config.prediction_type  # type: ignore[attr-defined]


def noise_pred(
    unet: UNet2DConditionModel,
    noisy_latents: Tensor,
    timesteps: Tensor,
    prompt_embeds: Tensor,
    residuals: tuple[tuple[Tensor, ...], Tensor] | None = None,
) -> Tensor:
    """The UNet's prediction in its own `prediction_type`, shape (B, 4, h, w).

    Args:
        unet: the host.
        noisy_latents: shape (B, 4, h, w).
        timesteps: integer, shape (B,).
        prompt_embeds: shape (B, tokens, width).
        residuals: skip residuals and mid residual of a patch.
    """
    extra: dict[str, Any] = {}
    if residuals is not None:
        extra["down_block_additional_residuals"], extra["mid_block_additional_residual"] = residuals
    return unet(noisy_latents, timesteps, encoder_hidden_states=prompt_embeds, **extra).sample


def add_noise(scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Noisy latents at integer `timesteps` of shape (B,), by the scheduler's own noise schedule."""
    return scheduler.add_noise(latents, noise, timesteps)


def alphas(scheduler: Any, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(a) and sqrt(1 - a) at `timesteps` (B,), each of shape (B, 1, 1, 1)."""
    if scheduler.alphas_cumprod.device != timesteps.device:
        scheduler.alphas_cumprod = moved(scheduler.alphas_cumprod, timesteps.device)  # once, not at every step
    cumulative = scheduler.alphas_cumprod[timesteps]
    return cumulative.sqrt().view(-1, 1, 1, 1), (1 - cumulative).sqrt().view(-1, 1, 1, 1)


def training_target(scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What a denoiser of this `prediction_type` is regressed on; shapes (B, 4, h, w)."""
    signal, sigma = alphas(scheduler, timesteps)
    targets = {"epsilon": noise, "v_prediction": signal * noise - sigma * latents, "sample": latents}
    return targets[prediction_type(scheduler)]

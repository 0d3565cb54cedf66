"""Images of prompts or of text states, as a pipeline draws them."""

import inspect
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from safepatch.diffusion.components import denoiser, uncompiled
from safepatch.diffusion.conditioning import Conditioning
from safepatch.diffusion.encoding import spared
from safepatch.diffusion.hosts.kinds import FLUX_EDGE, UNET, host_kind, usual_guidance
from safepatch.errors import PromptError


@torch.no_grad()
def generate(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int = 20,
    guidance_scale: float | None = None,
    negative_prompts: Sequence[str] | None = None,
    **more: Any,
) -> Tensor:
    """Images of `prompts`, one seed each, in [0, 1], shape (B, 3, H, W), on the CPU.

    A pipeline that changes pictures, as those that inpaint and SDXL's refiner do, is asked for wholly new ones.

    Args:
        pipe: with a patch applied or without.
        prompts: none may be empty.
        seeds: of the starting noise.
        steps: of denoising.
        guidance_scale: of classifier-free guidance; None takes what is usual for the model's family.
        negative_prompts: one per prompt.
        more: what else the pipeline is called with, e.g. `height` and `width`.

    Raises:
        PromptError: when a prompt is empty or the counts differ.
    """
    if len(prompts) != len(seeds):
        raise PromptError(f"{len(prompts)} prompts but {len(seeds)} seeds; give one seed per prompt")
    if any(not prompt.strip() for prompt in prompts):
        raise PromptError("a prompt is empty; say what to draw")
    images = pipe(
        list(prompts),
        num_inference_steps=steps,
        guidance_scale=usual_guidance(denoiser(pipe)) if guidance_scale is None else guidance_scale,
        negative_prompt=list(negative_prompts) if negative_prompts else None,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        output_type="pt",
        **{**spared(denoiser(pipe)), **more},
        **_nothing_to_keep(pipe, len(seeds)),
    ).images
    return images.float().cpu()


@torch.no_grad()
def generate_from_states(
    pipe: DiffusionPipeline,
    asked: Conditioning,
    negative: Conditioning,
    seeds: Sequence[int],
    steps: int = 20,
    guidance_scale: float | None = None,
    **more: Any,
) -> Tensor:
    """Images in [0, 1], (B, 3, H, W), of text states that need not be any text's.

    Args:
        pipe: with a patch applied or without.
        asked: of B prompts.
        negative: of the negative prompt, as many rows and tokens.
        seeds: one per row.
        steps: of denoising.
        guidance_scale: of classifier-free guidance; None takes what is usual for the model's family.
        more: what else the pipeline is called with.
    """
    pooled: dict[str, Any] = {}
    if asked.pooled is not None:
        pooled = {"pooled_prompt_embeds": asked.pooled, "negative_pooled_prompt_embeds": negative.pooled}
    images = pipe(
        prompt_embeds=asked.states,
        negative_prompt_embeds=negative.states,
        num_inference_steps=steps,
        guidance_scale=usual_guidance(denoiser(pipe)) if guidance_scale is None else guidance_scale,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        output_type="pt",
        **more,
        **pooled,
        **_nothing_to_keep(pipe, len(seeds)),
    ).images
    return images.float().cpu()


def _nothing_to_keep(pipe: Any, n: int) -> dict[str, Any]:
    """What a pipeline that starts from pictures is given so that it draws from noise: gray ones, masked as a whole."""
    asked = inspect.signature(type(pipe).__call__).parameters
    if "strength" not in asked:
        return {}
    edge, _ = own_sides(pipe)
    gray = torch.full((n, 3, edge, edge), 0.5)
    return {"image": gray, "strength": 1.0} | (
        {"mask_image": torch.ones_like(gray[:, :1])} if "mask_image" in asked else {}
    )


def own_sides(pipe: Any) -> tuple[int, int]:
    """Height and width, in pixels, of what a pipeline draws unless told otherwise, and what both are multiples of."""
    host = uncompiled(denoiser(pipe))
    folded = 1 if host_kind(host) is UNET else 2  # transformers read 2 x 2 latents at once
    return (host.config.get("sample_size") or FLUX_EDGE) * pipe.vae_scale_factor, folded * pipe.vae_scale_factor


def quiet(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Turn the pipeline's own progress bar off; returns it."""
    with suppress(AttributeError):
        pipe.set_progress_bar_config(disable=True)
    return pipe

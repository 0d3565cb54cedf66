"""What training and generation do with a pipeline's parts: encode, add noise, predict it, draw."""

import copy
import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor

from safepatch.diffusion.components import Components, denoiser, uncompiled
from safepatch.diffusion.conditioning import Conditioning, moved
from safepatch.diffusion.hosts.kinds import FLUX, FLUX_EDGE, UNET, host_kind, is_tiny_sd3, usual_guidance
from safepatch.errors import PromptError
from safepatch.files import replacing, unwritable

T5_TOKENS, SD3_TOKENS, FLUX_TOKENS = 77, 256, 512  # of T5: of an instruction, and of a prompt, unless told otherwise
ZEROS = 1  # that the embedded transformer is given for the T5 that it lacks: any number draws the same (DESIGN.md, 73)


def prediction_type(scheduler: object) -> str:
    """`epsilon`, `v_prediction` or `sample`."""
    return scheduler.config.prediction_type  # type: ignore[attr-defined]


def encode_prompts(components: Components, prompts: Sequence[str]) -> Tensor:
    """Text states of `prompts` as the pipeline computes them, shape (B, tokens, width); see `encode`."""
    return encode(components, prompts).states


@torch.no_grad()
def encode(components: Components, prompts: Sequence[str], t5_tokens: int = T5_TOKENS) -> Conditioning:
    """What the host reads of `prompts`, as its pipeline computes it.

    SD 1 and 2 read the text encoder's last layer; SDXL reads the last but one of each encoder, side by side, and the
    second one's pooled state, and zeros for the empty prompt. SD3 and Flux read as many tokens of T5 as is said; where
    SD3 lacks that, they are zeros.
    """
    if not prompts:
        raise PromptError("no prompts to encode; give at least one")
    if host_kind(components.unet) is not UNET:
        return _encode_by_pipeline(components, prompts, t5_tokens)
    read = encode_tokens(components, [_token_ids(tokenizer, prompts) for tokenizer, _ in components.text_encoders()])
    if read.pooled is None or components.text_encoder is None or "" not in prompts:
        return read
    said = torch.tensor([bool(prompt) for prompt in prompts], device=read.states.device)  # SDXL's base, not its refiner
    return read._replace(states=read.states * said[:, None, None], pooled=read.pooled * said[:, None])


def encode_words(components: Components, prompts: Sequence[str]) -> Tensor:
    """The text states of `prompts` by which gates go, (B, tokens, width): what CLIP's encoders say, not T5."""
    if host_kind(components.unet) is UNET:
        return encode(components, prompts).states
    return encode_tokens(components, [_token_ids(each, prompts) for each, _ in components.text_encoders()]).states


@torch.no_grad()
def encode_tokens(components: Components, tokens: Sequence[Tensor]) -> Conditioning:
    """What a UNet reads of prompts that are tokens already, (B, T) for each text encoder, with start, end, padding.

    Of SD3 it is what CLIP's encoders say, before T5's width is filled up. Flux is told CLIP's pooled state alone, which
    stands for text states here, (B, 1, width).
    """
    if host_kind(components.unet) is FLUX:
        (_, text_encoder), *_ = components.text_encoders()
        said: Tensor = text_encoder(tokens[0].to(text_encoder.device)).pooler_output
        return Conditioning(said[:, None], said)
    is_xl = components.text_encoder_2 is not None
    read = [read_tokens(each, ids, is_xl) for (_, each), ids in zip(components.text_encoders(), tokens, strict=True)]
    states = torch.cat([each for each, _ in read], dim=-1)
    return Conditioning(states, read[-1][1], tokens=torch.stack([*tokens], dim=1).to(states.device))


def read_tokens(text_encoder: Any, tokens: Tensor, is_xl: bool) -> tuple[Tensor, Tensor | None]:
    """States (B, T, width) that a UNet takes from one CLIP encoder, of tokens (B, T); of SDXL's the pooled ones too."""
    made = text_encoder(tokens.to(text_encoder.device), output_hidden_states=is_xl)
    return (made.hidden_states[-2], made[0]) if is_xl else (made.last_hidden_state, None)


def _token_ids(tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """(B, tokens), cut and filled up to the tokenizer's own length."""
    length = {"max_length": tokenizer.model_max_length, "padding": "max_length", "truncation": True}
    return tokenizer(list(prompts), return_tensors="pt", **length).input_ids


@torch.no_grad()
def _encode_by_pipeline(components: Components, prompts: Sequence[str], t5_tokens: int) -> Conditioning:
    """As SD3's and Flux's own pipelines do."""
    from diffusers import FluxPipeline, StableDiffusion3Pipeline  # slow to import, and rarely needed

    parts = {name: getattr(components, name) for name in ("scheduler", "vae", "text_encoder", "tokenizer")}
    parts |= {"transformer": components.unet}
    parts |= {"text_encoder_2": components.text_encoder_2, "tokenizer_2": components.tokenizer_2}
    options = {"max_sequence_length": t5_tokens, **spared(components.unet), "device": components.text_encoder.device}
    if host_kind(components.unet) is FLUX:
        with _hushed(FluxPipeline):
            states, pooled, _ = FluxPipeline(**parts).encode_prompt(list(prompts), None, **options)
        return Conditioning(states, pooled)
    parts |= {"text_encoder_3": components.text_encoder_3, "tokenizer_3": components.tokenizer_3}
    texts = [list(prompts)] * 3  # one for each encoder
    with _hushed(StableDiffusion3Pipeline):
        pipe = StableDiffusion3Pipeline(**parts)
        states, _, pooled, _ = pipe.encode_prompt(*texts, do_classifier_free_guidance=False, **options)
    return Conditioning(states, pooled)


def spared(host: Any) -> dict[str, int]:
    """What pipelines of the embedded transformer are told, so that four of five of its tokens are not nothing."""
    return {"max_sequence_length": ZEROS} if is_tiny_sd3(uncompiled(host)) else {}


@contextmanager
def _hushed(pipeline: type) -> Iterator[None]:
    """Within the block a class of pipelines does not say of every prompt what it cuts off."""
    logger = logging.getLogger(pipeline.__module__)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


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


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Scaled latents (B, 4, h, w) of images in [0, 1], shape (B, 3, H, W): the mode of the posterior.

    One by one: at 1024 pixels each takes gigabytes.
    """
    vae = _steady(vae)
    pixels = ((part * 2 - 1).to(vae.device, vae.dtype) for part in images.split(1))
    latents = torch.cat([vae.encode(part).latent_dist.mode() for part in pixels])
    return (latents - (vae.config.get("shift_factor") or 0)) * vae.config["scaling_factor"]


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Images in [0, 1], shape (B, 3, H, W), float32, on the CPU, of scaled latents (B, 4, h, w); one by one."""
    vae = _steady(vae)
    plain = latents / vae.config["scaling_factor"] + (vae.config.get("shift_factor") or 0)
    parts = (part.to(vae.device, vae.dtype) for part in plain.split(1))
    return torch.cat([(vae.decode(part).sample.float() / 2 + 0.5).clamp(0, 1).cpu() for part in parts])


def _steady(vae: AutoencoderKL) -> AutoencoderKL:
    """One that no picture makes overflow, as SDXL's does in half precision."""
    if vae.config.get("force_upcast") and vae.dtype == torch.float16:
        return copy.deepcopy(vae).float()
    return vae


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


def as_picture(image: Tensor) -> Image.Image:
    """An image in [0, 1], shape (3, H, W), in 8 bits."""
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def save_image(image: Tensor, path: Path) -> None:
    """Write an image as PNG, all or nothing; raises `SafepatchError` when it cannot be.

    Args:
        image: in [0, 1], shape (3, H, W).
        path: of the file.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            as_picture(image).save(file, "PNG")
    except OSError as error:
        raise unwritable(path, error, "choose another -o") from error

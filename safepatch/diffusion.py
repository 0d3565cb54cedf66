"""What the rest of the package needs from diffusers and transformers, so that nobody else must import them."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from safepatch.errors import BaseMismatch, ModelNotFound, PromptError, SafepatchError

FAMILIES: dict[int, str] = {192: "tiny-sd", 768: "sd1", 1024: "sd2", 2048: "sdxl"}
FINGERPRINT_KEYS = ("block_out_channels", "down_block_types", "layers_per_block", "cross_attention_dim")


@dataclass(frozen=True)
class Components:
    """The parts of a Stable Diffusion pipeline that safepatch works with, under diffusers' own names."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: Any

    @classmethod
    def of(cls, pipe: DiffusionPipeline) -> "Components":
        """The components of a built pipeline; raises `BaseMismatch` when one is missing."""
        missing = [name for name in cls.__dataclass_fields__ if getattr(pipe, name, None) is None]
        if missing:
            raise BaseMismatch(f"{type(pipe).__name__} has no {', '.join(missing)}; safepatch needs a UNet pipeline")
        return cls(**{name: getattr(pipe, name) for name in cls.__dataclass_fields__})

    def freeze(self) -> "Components":
        """Put every module in evaluation mode without gradients; returns itself."""
        for module in (self.unet, self.vae, self.text_encoder):
            module.eval().requires_grad_(False)
        return self

    def to(self, device: torch.device) -> "Components":
        """Move every module to `device`; returns itself."""
        for module in (self.unet, self.vae, self.text_encoder):
            module.to(device)
        return self


def load(source: str | Path) -> StableDiffusionPipeline:
    """A pipeline from a diffusers folder, a single `.safetensors` file, or a Hub id.

    Raises:
        ModelNotFound: when `source` is neither a path that exists nor a Hub id that can be fetched.
    """
    path = Path(source)
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ModelNotFound(f"{path} has no model_index.json; give a folder saved by diffusers")
        return StableDiffusionPipeline.from_pretrained(path, local_files_only=True, **_QUIET)
    if path.suffix in (".safetensors", ".ckpt") or str(source).startswith((".", "/")):
        if not path.is_file():
            raise ModelNotFound(f"no file at {path}; check the path of the checkpoint")
        return StableDiffusionPipeline.from_single_file(str(path), **_QUIET)
    try:
        return StableDiffusionPipeline.from_pretrained(str(source), **_QUIET)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:120]
        raise ModelNotFound(f"no model '{source}' here or on the Hub ({reason}); give a folder or a file") from error


_QUIET: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False}


def fingerprint(unet: UNet2DConditionModel) -> dict[str, Any]:
    """What two UNets must share for a patch of the one to fit the other, as plain JSON values."""
    values = {key: unet.config[key] for key in FINGERPRINT_KEYS}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def family(unet: UNet2DConditionModel) -> str:
    """The model family by the width of its text states: tiny-sd, sd1, sd2, sdxl, or `unknown`."""
    width = unet.config["cross_attention_dim"]
    return FAMILIES.get(width, "unknown") if isinstance(width, int) else "unknown"


def usual_guidance(unet: UNet2DConditionModel) -> float:
    """The classifier-free guidance scale that suits the model's family: 1.5 for tiny-sd (DESIGN.md, 10), else 7.5."""
    return 1.5 if family(unet) == "tiny-sd" else 7.5


def prediction_type(scheduler: object) -> str:
    """`epsilon`, `v_prediction` or `sample`."""
    return scheduler.config.prediction_type  # type: ignore[attr-defined]


@torch.no_grad()
def encode_prompts(components: Components, prompts: Sequence[str]) -> Tensor:
    """Text states of `prompts` as the pipeline computes them, shape (B, tokens, width)."""
    tokenizer = components.tokenizer
    if not prompts:
        raise PromptError("no prompts to encode; give at least one")
    ids = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return components.text_encoder(ids.to(components.text_encoder.device)).last_hidden_state


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
    cumulative = scheduler.alphas_cumprod[timesteps.cpu()].to(timesteps.device)
    return cumulative.sqrt().view(-1, 1, 1, 1), (1 - cumulative).sqrt().view(-1, 1, 1, 1)


def training_target(scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What a denoiser of this `prediction_type` is regressed on; shapes (B, 4, h, w)."""
    signal, sigma = alphas(scheduler, timesteps)
    targets = {"epsilon": noise, "v_prediction": signal * noise - sigma * latents, "sample": latents}
    return targets[prediction_type(scheduler)]


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Scaled latents (B, 4, h, w) of images in [0, 1], shape (B, 3, H, W): the mode of the posterior."""
    pixels = (images * 2 - 1).to(vae.device, vae.dtype)
    return vae.encode(pixels).latent_dist.mode() * vae.config["scaling_factor"]


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Images in [0, 1], shape (B, 3, H, W), of scaled latents (B, 4, h, w)."""
    decoded = vae.decode(latents / vae.config["scaling_factor"]).sample
    return (decoded / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def generate(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int = 20,
    guidance_scale: float | None = None,
    negative_prompts: Sequence[str] | None = None,
) -> Tensor:
    """Images of `prompts`, one seed each, in [0, 1], shape (B, 3, H, W), on the CPU.

    Args:
        pipe: with a patch applied or without.
        prompts: none may be empty.
        seeds: of the starting noise.
        steps: of denoising.
        guidance_scale: of classifier-free guidance; None takes what is usual for the model's family.
        negative_prompts: one per prompt.

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
        guidance_scale=usual_guidance(pipe.unet) if guidance_scale is None else guidance_scale,
        negative_prompt=list(negative_prompts) if negative_prompts else None,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        output_type="pt",
    ).images
    return images.float().cpu()


def generate_latents(components: Components, prompts: Sequence[str], seeds: Sequence[int], steps: int = 10) -> Tensor:
    """Clean scaled latents (B, 4, h, w) that the model itself makes of `prompts`, one seed each; "" is allowed."""
    parts = {name: getattr(components, name) for name in components.__dataclass_fields__}
    pipe = quiet(StableDiffusionPipeline(**parts, feature_extractor=None, **_QUIET))
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    guidance_scale = usual_guidance(components.unet)
    options = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "output_type": "latent"}
    return pipe(list(prompts), generator=generators, **options).images.float()


def quiet(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Turn the pipeline's own progress bar off; returns it."""
    with suppress(AttributeError):
        pipe.set_progress_bar_config(disable=True)
    return pipe


def save_image(image: Tensor, path: Path) -> None:
    """Write an image in [0, 1], shape (3, H, W), as PNG; raises `SafepatchError` when the folder cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(path, format="PNG")
    except OSError as error:
        raise SafepatchError(f"cannot write {path} ({error.strerror or error}); choose another -o") from error

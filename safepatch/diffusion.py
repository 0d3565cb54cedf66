"""What the rest of the package needs from diffusers and transformers, so that nobody else must import them."""

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from safepatch.errors import BaseMismatch, ModelNotFound, PromptError, SafepatchError, UnsupportedModel

FAMILIES: dict[int, str] = {192: "tiny-sd", 768: "sd1", 1024: "sd2", 1280: "sdxl-refiner", 2048: "sdxl"}
FINGERPRINT_KEYS = ("block_out_channels", "down_block_types", "layers_per_block", "cross_attention_dim")


@dataclass(frozen=True)
class Components:
    """The parts of a Stable Diffusion pipeline that safepatch works with, under diffusers' own names.

    SDXL has a second text encoder; its refiner has only the second, and None for the first.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: Any
    text_encoder_2: Any = None
    tokenizer_2: Any = None

    @classmethod
    def of(cls, pipe: DiffusionPipeline) -> "Components":
        """The components of a built pipeline, without `torch.compile`'s wrappers.

        Raises:
            UnsupportedModel: when the pipeline draws with something else than a UNet.
            BaseMismatch: when a component is missing.
        """
        if getattr(pipe, "unet", None) is None:
            raise not_supported(type(pipe).__name__)
        parts = {name: uncompiled(getattr(pipe, name, None)) for name in cls.__dataclass_fields__}
        second = "_2" if parts["text_encoder_2"] is not None else ""
        needed = ("vae", "scheduler", f"text_encoder{second}", f"tokenizer{second}")
        missing = [name for name in needed if parts[name] is None]
        if missing:
            raise BaseMismatch(
                f"{type(pipe).__name__} has no {', '.join(missing)}; build the pipeline with all its parts"
            )
        return cls(**parts)

    def modules(self) -> list[Any]:
        """The neural networks among the components."""
        named = (self.unet, self.vae, self.text_encoder, self.text_encoder_2)
        return [module for module in named if module is not None]

    def text_encoders(self) -> list[tuple[Any, Any]]:
        """Tokenizer and text encoder pairs, in the order in which the UNet's text states hold them."""
        pairs = ((self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2))
        return [pair for pair in pairs if pair[1] is not None]

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the UNet computes in; float32 where its weights are stored in less than 16 bits."""
        dtype = self.unet.dtype
        return dtype if dtype.is_floating_point and dtype.itemsize > 1 else torch.float32

    def freeze(self) -> "Components":
        """Put every module in evaluation mode without gradients; returns itself."""
        for module in self.modules():
            module.eval().requires_grad_(False)
        return self

    def to(self, device: torch.device) -> "Components":
        """Move every module to `device`; returns itself."""
        for module in self.modules():
            module.to(device)
        return self


def uncompiled(module: Any) -> Any:
    """The module inside `torch.compile`'s wrapper, or the module itself."""
    return getattr(module, "_orig_mod", module)


def without_image_prompts(module: nn.Module) -> nn.Module:
    """The module with plain attention where an IP-Adapter made it read image tokens too; changed in place.

    An IP-Adapter's processors, the only ones that carry weights, take the last of the text tokens for an image's where
    none are passed.
    """
    parts: list[Any] = list(module.modules())
    for part in parts:
        if isinstance(part, Attention) and isinstance(part.processor, nn.Module):
            part.set_processor(AttnProcessor2_0())
    return module


def not_supported(name: str) -> UnsupportedModel:
    """The error for a pipeline or model that draws without a UNet, or with a UNet of an unknown kind."""
    return UnsupportedModel(f"not supported yet: {name}; use a UNet model (Stable Diffusion 1, 2 or XL)")


def calling_pipeline() -> DiffusionPipeline | None:
    """The innermost pipeline on the call stack: whoever is drawing right now."""
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, DiffusionPipeline):
            return owner
        frame = frame.f_back
    return None


def load_folder(path: Path, dtype: torch.dtype | None) -> DiffusionPipeline:
    """The pipeline that diffusers saved in the folder `path`, of whatever class its index names.

    Raises:
        ModelNotFound: when the folder holds no pipeline.
        UnsupportedModel: when its pipeline has no UNet; known before any weight is read.
    """
    index = read_json(path / "model_index.json")
    if "unet" not in index:
        raise not_supported(str(index.get("_class_name", path)))
    return DiffusionPipeline.from_pretrained(path, local_files_only=True, dtype=dtype, **_unchecked(index))


def load_single_file(
    path: Path, config: Path, tokenizers: Mapping[str, CLIPTokenizer], dtype: torch.dtype | None
) -> DiffusionPipeline:
    """The pipeline in a file of the original (CompVis/LDM) layout; never asks the network.

    Args:
        path: the checkpoint.
        config: folder with `model_index.json` and a configuration per component, as diffusers lays them out.
        tokenizers: by component name; they are not in such files.
        dtype: of all weights; float32 when None.

    Raises:
        UnsupportedModel: when the file lacks weights that its family has.
    """
    index = read_json(config / "model_index.json")
    build = getattr(diffusers, index["_class_name"]).from_single_file
    try:
        pipe = build(
            str(path), config=str(config), local_files_only=True, dtype=dtype, **tokenizers, **_unchecked(index)
        )
    except NotImplementedError as error:  # torch, on moving a weight that was never filled in
        raise UnsupportedModel(f"{path} lacks weights of its UNet or VAE; fetch the whole file") from error
    except (ValueError, KeyError, RuntimeError) as error:
        raise UnsupportedModel(f"{path} cannot be read as {index['_class_name']} ({_first_line(error)})") from error
    for part in Components.of(pipe).modules():
        absent = [name for name, tensor in part.named_parameters() if tensor.is_meta]
        if absent:
            raise UnsupportedModel(f"{path} lacks {len(absent)} weights of {type(part).__name__}, e.g. '{absent[0]}'")
    return pipe


def read_unet(source: str | Path, config: Path | None = None) -> UNet2DConditionModel:
    """The UNet alone of a diffusers folder or Hub id, or, with `config` as above, of a single file."""
    if config is None:
        return UNet2DConditionModel.from_pretrained(str(source), subfolder="unet")
    return UNet2DConditionModel.from_single_file(
        str(source), config=str(config), subfolder="unet", local_files_only=True
    )


def load_from_hub(name: str, dtype: torch.dtype | None) -> DiffusionPipeline:
    """The pipeline of a Hub id, from the cache or the network; raises `ModelNotFound` when neither has it."""
    try:
        index = DiffusionPipeline.load_config(name)
        return DiffusionPipeline.from_pretrained(name, dtype=dtype, **_unchecked(index))
    except (OSError, ValueError) as error:
        raise ModelNotFound(
            f"no model '{name}' here or on the Hub ({_first_line(error)}); give a folder or a file"
        ) from error


def load_tokenizer(source: str | Path, pad_token: str | None = None) -> CLIPTokenizer:
    """CLIP's tokenizer from a folder or the local Hub cache, padding with `pad_token` where its vocabulary has that.

    Raises:
        ModelNotFound: when it is in neither.
    """
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(source), local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise ModelNotFound(
            f"no CLIP tokenizer at '{source}', and a single file holds none; pass --tokenizer FOLDER (in Python "
            f"tokenizer=...), or download {CLIP} to the Hub cache once"
        ) from error
    if pad_token in tokenizer.get_vocab():
        tokenizer.pad_token = pad_token
    return tokenizer


def hub_unet_config(name: str) -> dict[str, Any]:
    """Configuration of the UNet of a Hub id; no weights are fetched."""
    try:
        return dict(UNet2DConditionModel.load_config(name, subfolder="unet"))
    except (OSError, ValueError) as error:
        raise ModelNotFound(f"no UNet of '{name}' here or on the Hub ({_first_line(error)})") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON table of a model folder; raises `ModelNotFound` when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelNotFound(f"{path.parent} has no {path.name}; give a folder saved by diffusers") from error
    except (OSError, ValueError) as error:
        raise ModelNotFound(f"cannot read {path} ({_first_line(error)}); save or fetch the model again") from error


CLIP = "openai/clip-vit-large-patch14"
_QUIET: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False}


def _unchecked(index: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that leave the safety checker out of a pipeline that has one."""
    return _QUIET if "safety_checker" in index else {}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


def fingerprint(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the configurations of two UNets must share for a patch of the one to fit the other, as plain JSON values."""
    values = {key: config[key] for key in FINGERPRINT_KEYS}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def family(config: Mapping[str, Any]) -> str:
    """The model family by the width of its UNet's text states, e.g. `sd1`, or `unknown`."""
    width = config["cross_attention_dim"]
    return FAMILIES.get(width, "unknown") if isinstance(width, int) else "unknown"


def usual_guidance(unet: UNet2DConditionModel) -> float:
    """The classifier-free guidance scale that suits the model's family: 1.5 for tiny-sd (DESIGN.md, 10), else 7.5."""
    return 1.5 if family(unet.config) == "tiny-sd" else 7.5


def prediction_type(scheduler: object) -> str:
    """`epsilon`, `v_prediction` or `sample`."""
    return scheduler.config.prediction_type  # type: ignore[attr-defined]


@torch.no_grad()
def encode_prompts(components: Components, prompts: Sequence[str]) -> Tensor:
    """Text states of `prompts` as the pipeline computes them, shape (B, tokens, width).

    SD 1 and 2 read the text encoder's last layer; SDXL reads the last but one of each encoder, side by side.
    """
    if not prompts:
        raise PromptError("no prompts to encode; give at least one")
    states = []
    for tokenizer, text_encoder in components.text_encoders():
        ids = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids.to(text_encoder.device)
        made = text_encoder(ids, output_hidden_states=components.text_encoder_2 is not None)
        states.append(made.last_hidden_state if components.text_encoder_2 is None else made.hidden_states[-2])
    return torch.cat(states, dim=-1)


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


@torch.no_grad()
def generate_from_states(
    pipe: DiffusionPipeline, states: Tensor, negative_states: Tensor, seeds: Sequence[int], steps: int = 20
) -> Tensor:
    """Images in [0, 1], (B, 3, H, W), of text states that need not be any text's, at the family's usual guidance.

    Args:
        pipe: with a patch applied or without.
        states: (B, tokens, width).
        negative_states: of the negative prompt, the same shape.
        seeds: one per row.
        steps: of denoising.
    """
    images = pipe(
        prompt_embeds=states,
        negative_prompt_embeds=negative_states,
        num_inference_steps=steps,
        guidance_scale=usual_guidance(pipe.unet),
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        output_type="pt",
    ).images
    return images.float().cpu()


def generate_latents(components: Components, prompts: Sequence[str], seeds: Sequence[int], steps: int = 10) -> Tensor:
    """Clean scaled latents (B, 4, h, w) that the model itself makes of `prompts`, one seed each; "" is allowed."""
    names = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    parts = {name: getattr(components, name) for name in names}
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

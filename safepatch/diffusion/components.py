"""The parts of a diffusers pipeline."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import AttnProcessor2_0, JointAttnProcessor2_0
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from safepatch.diffusion.hosts.kinds import FLUX, TRANSFORMERS, UNET, host_kind
from safepatch.errors import BaseMismatch, ConfigError, UnsupportedModel

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")  # that a patch may be for
UNCHECKED: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False}  # of a new pipeline


@dataclass(frozen=True)
class Components:
    """The parts of a pipeline that safepatch works with, under diffusers' own names.

    SDXL has a second text encoder; its refiner has only the second, and None for the first. SD3 has a third. `unet` is
    whatever denoises: for SD3 and Flux their transformer.
    """

    unet: Any
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: Any
    text_encoder_2: Any = None
    tokenizer_2: Any = None
    text_encoder_3: Any = None
    tokenizer_3: Any = None

    @classmethod
    def of(cls, pipe: DiffusionPipeline) -> "Components":
        """The components of a built pipeline, without `torch.compile`'s wrappers.

        Raises:
            UnsupportedModel: when the pipeline draws with neither a UNet nor a transformer of SD3 or Flux.
            BaseMismatch: when a component is missing.
        """
        if denoiser(pipe) is None:
            raise not_supported(type(pipe).__name__)
        parts = {name: uncompiled(getattr(pipe, name, None)) for name in cls.__dataclass_fields__}
        parts["unet"] = uncompiled(denoiser(pipe))
        second = "_2" if parts["text_encoder_2"] is not None else ""
        needed = ["vae", "scheduler", f"text_encoder{second}", f"tokenizer{second}"]
        if host_kind(parts["unet"]) is not UNET:
            needed += ["text_encoder", "tokenizer"]
            needed += [] if second else ["text_encoder_2", "tokenizer_2"]
        missing = [name for name in needed if parts[name] is None]
        if missing:
            raise BaseMismatch(
                f"{type(pipe).__name__} has no {', '.join(missing)}; build the pipeline with all its parts"
            )
        if not hasattr(parts["vae"], "decoder"):
            raise UnsupportedModel(f"{type(parts['vae']).__name__} has no decoder to watch; use an AutoencoderKL")
        return cls(**parts)

    def modules(self) -> list[Any]:
        """The neural networks among the components."""
        named = (self.unet, self.vae, self.text_encoder, self.text_encoder_2, self.text_encoder_3)
        return [module for module in named if module is not None]

    def text_encoders(self) -> list[tuple[Any, Any]]:
        """CLIP's tokenizer and text encoder pairs, in the order in which the text states hold them.

        Raises:
            UnsupportedModel: for an encoder of a UNet that is not CLIP's: its states are not read as CLIP's are.
        """
        if host_kind(self.unet) is UNET:
            _require_clip(self.text_encoder, self.text_encoder_2)
        pairs = ((self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2))
        pairs = pairs[:1] if host_kind(self.unet) is FLUX else pairs
        return [pair for pair in pairs if pair[1] is not None]

    def encoder(self, component: str) -> tuple[int, Any]:
        """A text encoder by its name in the pipeline, and its number among those whose states the UNet is given.

        Raises:
            BaseMismatch: where there is none of that name.
            ConfigError: where a transformer draws.
        """
        if host_kind(self.unet) is not UNET:
            raise ConfigError(f"not supported yet: a patch of the {component} of a {type(self.unet).__name__}")
        found = getattr(self, component)
        places = [encoder for _, encoder in self.text_encoders()]
        if found is None:
            kept = [name for name in TEXT_ENCODERS if getattr(self, name) is not None]
            raise BaseMismatch(f"this model has no {component} to patch; it has {' and '.join(kept)}")
        return next(number for number, each in enumerate(places) if each is found), found

    def t5(self) -> tuple[Any, Any] | None:
        """T5's tokenizer and encoder, of a transformer that has them."""
        kind = host_kind(self.unet)
        pair = (self.tokenizer_2, self.text_encoder_2) if kind is FLUX else (self.tokenizer_3, self.text_encoder_3)
        return None if kind is UNET or pair[1] is None else pair

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


def _require_clip(*encoders: Any) -> None:
    """Raise `UnsupportedModel` for a text encoder that is not CLIP's."""
    for encoder in encoders:
        if encoder is not None and not isinstance(encoder, CLIPTextModel | CLIPTextModelWithProjection):
            raise UnsupportedModel(f"not supported yet: the text encoder is a {type(encoder).__name__}, not CLIP's")


def denoiser(pipe: Any) -> Any:
    """What a pipeline denoises with, as it stands there: its UNet, its SD3 or Flux transformer, or None."""
    unet, transformer = getattr(pipe, "unet", None), getattr(pipe, "transformer", None)
    is_known = type(uncompiled(transformer)).__name__ in TRANSFORMERS
    return transformer if unet is None and is_known else unet


def uncompiled(module: Any) -> Any:
    """The module inside `torch.compile`'s wrapper, or the module itself."""
    return getattr(module, "_orig_mod", module)


def is_compiled(module: Any) -> bool:
    """Whether `torch.compile`, or the module's own `compile`, was called on it."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def without_image_prompts(module: nn.Module) -> nn.Module:
    """The module with plain attention where an IP-Adapter made it read image tokens too; changed in place.

    An IP-Adapter's processors, the only ones that carry weights, take the last of the text tokens for an image's, or
    fail, where none are passed.
    """
    parts: list[Any] = list(module.modules())
    for part in parts:
        if isinstance(getattr(part, "processor", None), nn.Module):
            part.set_processor(_plain_processor(part))
    return module


def _plain_processor(attention: Any) -> Any:
    if isinstance(attention, AttentionModuleMixin):
        default: Any = attention._default_processor_cls
        return default()
    joint = "Joint" in type(attention.processor).__name__
    return JointAttnProcessor2_0() if joint else AttnProcessor2_0()


def has_fused_projections(host: nn.Module) -> bool:
    """Whether `fuse_qkv_projections()` makes some attention run on copies of its layers' weights."""
    parts: list[Any] = [part for part in host.modules() if hasattr(part, "processor")]
    return any(
        part.fused_projections if isinstance(part, AttentionModuleMixin) else "Fused" in type(part.processor).__name__
        for part in parts
    )


def is_offloaded_to_disk(host: nn.Module) -> bool:
    """Whether diffusers' group offloading keeps weights of the host in files, and placeholders in their stead."""
    registries = [registry for part in host.modules() if (registry := getattr(part, "_diffusers_hook", None))]
    groups = [getattr(hook, "group", None) for registry in registries for hook in registry.hooks.values()]
    return any(getattr(group, "offload_to_disk_path", None) for group in groups)


def not_supported(name: str) -> UnsupportedModel:
    """The error for a pipeline or model of a kind that patches do not know."""
    return UnsupportedModel(f"not supported yet: {name}; use Stable Diffusion 1, 2, XL or 3, or Flux 1")

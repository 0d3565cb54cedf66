"""The parts of a diffusers pipeline, and what kind of UNet it draws with."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from safepatch.errors import BaseMismatch, UnsupportedModel

FAMILIES: dict[int, str] = {192: "tiny-sd", 768: "sd1", 1024: "sd2", 1280: "sdxl-refiner", 2048: "sdxl"}
UNCHECKED: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False}  # of a new pipeline
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


def is_compiled(module: Any) -> bool:
    """Whether `torch.compile`, or the module's own `compile`, was called on it."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


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

"""What things are called in LoRA files: layers by kohya's names, which user interfaces read, and by PEFT's."""

from collections.abc import Iterable, Mapping
from typing import Any

from safepatch.artifact.info import EXPORTED
from safepatch.diffusion import UNET, config_kind, family

KOHYA = "lora_unet_"
EXPORTED_GATE = f"{EXPORTED}.gate"  # metadata: a gate's weights; as tensors diffusers would refuse them
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
ADAPTER = "lora_adapter_metadata"  # diffusers' name for PEFT's settings
TEXT_ENCODERS = ("lora_te_", "lora_te1_", "lora_te2_", "text_encoder.", "text_encoder_2.")
COMPONENTS = ("unet.", "transformer.")  # in which diffusers' LoRAs say that layers are
PEFT = (*COMPONENTS, "base_model.model.", "")


def kohya_name(layer: str, config: Mapping[str, Any]) -> str:
    """The name of a layer in kohya's files: diffusers' path of SD 1 and 2, the original (sgm) path of SDXL."""
    path = original_path(layer, config) if family(config).startswith("sdxl") else layer
    return KOHYA + path.replace(".", "_")


def text_name(layer: str, component: str, config: Mapping[str, Any]) -> str:
    """The name of a text encoder's layer in kohya's files: encoders are numbered in SDXL's."""
    number = {"text_encoder": "1", "text_encoder_2": "2"}[component] if family(config).startswith("sdxl") else ""
    return f"lora_te{number}_text_model_{layer.replace('.', '_')}"


def peft_name(layer: str, component: str) -> str:
    """The name of a layer in PEFT's files."""
    return f"{component}.{layer}" if f"{component}." in COMPONENTS else f"{component}.text_model.{layer}"


def text_layers_by_name(layers: Iterable[str], component: str, config: Mapping[str, Any]) -> dict[str, str]:
    """`layers_by_name` of a text encoder's."""
    found = {text_name(layer, component, config): layer for layer in layers}
    return found | {peft_name(layer, component): layer for layer in layers}


def original_path(layer: str, config: Mapping[str, Any]) -> str:
    """Where a layer of diffusers' UNet is in the original one, in which blocks are numbered through."""
    side, *path = layer.split(".")
    if side == "mid_block":
        return ".".join(("middle_block", "1", *path[2:]))
    block, _, place, *rest = path
    number = int(block) * (config["layers_per_block"] + 1) + int(place)
    name = f"input_blocks.{number + 1}" if side == "down_blocks" else f"output_blocks.{number}"
    return ".".join((name, "1", *rest))


def layers_by_name(layers: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, str]:
    """Every name that a file may have for a layer, in front of its suffix -> the layer's own."""
    found = {}
    for layer in layers:
        found |= {f"{prefix}{layer}": layer for prefix in PEFT}
        paths = (layer, original_path(layer, config)) if config_kind(config) is UNET else ()
        found |= {KOHYA + path.replace(".", "_"): layer for path in paths}
    return found

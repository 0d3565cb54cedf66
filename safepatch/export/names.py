"""What things are called in LoRA files: layers by kohya's names, which user interfaces read, and by PEFT's."""

from collections.abc import Iterable, Mapping
from typing import Any

from safepatch.artifact.info import EXPORTED
from safepatch.diffusion import UNET, config_kind, family
from safepatch.export.joined import KOHYA, original_layers

EXPORTED_GATE = f"{EXPORTED}.gate"  # metadata: a gate's weights; as tensors diffusers would refuse them
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
ADAPTER = "lora_adapter_metadata"  # diffusers' name for PEFT's settings
GUARD = "safepatch"  # a tensor: diffusers refuses a file with a name that has no "lora" in it
TEXT_ENCODERS = ("lora_te_", "lora_te1_", "lora_te2_", "text_encoder.", "text_encoder_2.")
COMPONENTS = ("unet.", "transformer.")  # in which diffusers' LoRAs say that layers are
PEFT = (*COMPONENTS, "base_model.model.", "")
NUMBERS = {"text_encoder": "1", "text_encoder_2": "2"}  # kohya's, of text encoders
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}  # what diffusers calls a residual block's layers -> the original layout


def kohya_name(layer: str, config: Mapping[str, Any]) -> str:
    """The name of a UNet's layer in kohya's files: diffusers' path of SD 1 and 2, the original (sgm) path of SDXL."""
    path = original_path(layer, config) if family(config).startswith("sdxl") else layer
    return KOHYA + path.replace(".", "_")


def text_name(layer: str, component: str, config: Mapping[str, Any]) -> str:
    """The name of a text encoder's layer in kohya's files: encoders are numbered in SDXL's."""
    return _text_name(layer, NUMBERS[component] if family(config).startswith("sdxl") else "")


def _text_name(layer: str, number: str) -> str:
    return f"lora_te{number}_text_model_{layer.replace('.', '_')}"


def peft_name(layer: str, component: str) -> str:
    """The name of a layer in PEFT's files."""
    return f"{component}.{layer}" if f"{component}." in COMPONENTS else f"{component}.text_model.{layer}"


def original_path(layer: str, config: Mapping[str, Any]) -> str:
    """Where a layer of diffusers' UNet is in the original one, in which blocks are numbered through."""
    side, *path = layer.split(".")
    if side == "mid_block":
        part, place, *rest = path
        return ".".join(("middle_block", "1" if part == "attentions" else str(2 * int(place)), *_inner(rest)))
    block, part, place, *rest = path
    step = config["layers_per_block"] + 1  # input blocks of a level: residual blocks, and what samples down
    first = step * int(block)
    if part == "downsamplers":
        return f"input_blocks.{first + step}.0.op"
    if part == "upsamplers":
        attends = "CrossAttn" in config["down_block_types"][-1 - int(block)]  # the way up mirrors the way down
        return f"output_blocks.{first + step - 1}.{2 if attends else 1}.conv"
    number = first + int(place)
    name = f"input_blocks.{number + 1}" if side == "down_blocks" else f"output_blocks.{number}"
    return ".".join((name, "1" if part == "attentions" else "0", *_inner(rest)))


def _inner(path: list[str]) -> list[str]:
    return [RESNET.get(path[0], path[0]), *path[1:]]


def layers_by_name(layers: Iterable[str], config: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Every name that a file may have, in front of its suffix -> the layers that it is of, in the order of its rows.

    Of what is no layer of diffusers' alone: the original layout of a transformer joins several.
    """
    layers = tuple(layers)
    found = {f"{prefix}{layer}": (layer,) for layer in layers for prefix in PEFT}
    if config_kind(config) is not UNET:
        flat = {f"lora_transformer_{layer.replace('.', '_')}": (layer,) for layer in layers}  # OneTrainer's
        return found | flat | original_layers(layers, config)
    paths = [(path, layer) for layer in layers for path in (layer, original_path(layer, config))]
    return found | {KOHYA + path.replace(".", "_"): (layer,) for path, layer in paths}


def text_layers_by_name(layers: Iterable[str], component: str, config: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """`layers_by_name` of a text encoder's, which some classes wrap and some do not."""
    found: dict[str, tuple[str, ...]] = {}
    for layer in layers:
        numbered = _text_name(layer, NUMBERS[component])  # some programs number the only one too
        names = (numbered, text_name(layer, component, config), peft_name(layer, component), f"{component}.{layer}")
        found |= dict.fromkeys(names, (layer,))
    return found

"""Where the weights of CLIP's text encoders are in files: under their own names, or as single files of old have them.

OpenAI's CLIP keeps its names there behind a prefix; OpenCLIP's queries, keys and values are one tensor.
"""

import re

from safepatch.models.checkpoint import CLIP, FAMILIES, OPEN_CLIP
from safepatch.models.flow_layout import Place
from safepatch.models.weights import Weights

TEXT_MODEL = "text_model."  # what some classes and files put in front
LAYERS = {  # OpenCLIP's name: transformers'
    "attn.in_proj_": "self_attn.{}_proj.",
    "attn.out_proj.": "self_attn.out_proj.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}
_BLOCK = re.compile(rf"transformer\.resblocks\.(\d+)\.({'|'.join(map(re.escape, LAYERS))})(weight|bias)")


def text_places(file: Weights, component: str) -> dict[str, Place]:
    """Of a text encoder's weights, by transformers' names without `text_model.`, which tensor of a file holds each.

    Of a single file those of the blocks' linear layers; of any other all that it holds.

    Args:
        file: of the text encoder alone, or a whole checkpoint in the original layout.
        component: `text_encoder` or `text_encoder_2`.
    """
    family = next(
        (kind for prefix, kind in FAMILIES.items() if any(name.startswith(prefix) for name in file.tensors)), ""
    )
    if not family:
        return {name.removeprefix(TEXT_MODEL): Place(name) for name in file.tensors}
    if prefix := CLIP.get(family, {}).get(component):
        return {name.removeprefix(prefix): Place(name) for name in file.tensors if name.startswith(prefix)}
    prefix, found = OPEN_CLIP.get(family, {}).get(component), dict[str, Place]()
    for name in file.tensors if prefix else ():
        if block := _BLOCK.fullmatch(name.removeprefix(prefix or "")):
            found |= _block(name, *block.groups(), rows=file.tensors[name].shape[0])
    return found


def _block(stored: str, number: str, layer: str, end: str, rows: int) -> dict[str, Place]:
    """The weights in a tensor of one of OpenCLIP's blocks."""
    name, third = f"encoder.layers.{number}.{LAYERS[layer]}{end}", rows // 3
    if "{}" not in name:
        return {name: Place(stored)}
    return {name.format(part): Place(stored, (slice(i * third, (i + 1) * third),)) for i, part in enumerate("qkv")}

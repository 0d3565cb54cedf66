"""What `lora_out` wrote as the patch that it was, with its gate, to the last bit."""

import base64
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from safepatch.artifact.info import EXPORTED, PatchInfo
from safepatch.artifact.patch_artifact import PatchArtifact, part_prefix
from safepatch.diffusion import UNET
from safepatch.errors import ArtifactError
from safepatch.export.factors import Side, read_factors
from safepatch.export.joined import rows_of
from safepatch.export.names import EXPORTED_GATE, GUARD, layers_by_name, text_layers_by_name
from safepatch.models.weights import Weights

# What reading shapes, numbers and tables that are not what they should be ends in.
DAMAGES = (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, ZeroDivisionError)


def exported(weights: Weights) -> PatchArtifact:
    """The patch that `export` was given; raises `ArtifactError` unless its hash says that it is still that one."""
    try:
        record = json.loads(weights.metadata[EXPORTED])
        info = PatchInfo.from_metadata(record["metadata"])
        gate = json.loads(weights.metadata.get(EXPORTED_GATE, "{}"))
        tensors = {name: _unpacked(packed) for name, packed in gate.items()}
        left = {*weights.tensors} - {GUARD}
        for prefix, own in _singles(info):
            read = read_factors(weights, _side_of(own), None, record.get("ranks"))
            tensors |= {f"{prefix}{name}": tensor for name, tensor in read.tensors.items()}
            left -= read.used
        if left:
            raise ValueError(f"'{min(left)}' is no part of it")
        artifact, stated = PatchArtifact(tensors, info), record["hash"]
    except DAMAGES as error:
        raise ArtifactError(f"{weights.path} is damaged: what it says of its patch cannot be read ({error})") from error
    if artifact.content_hash != stated:
        raise ArtifactError(
            f"{weights.path} is no longer the patch that was exported: its weights or its metadata were changed; "
            "import it as somebody else's LoRA, with --category"
        )
    return artifact


def _singles(info: PatchInfo) -> list[tuple[str, PatchInfo]]:
    """What a bundle keeps apart, each with what its tensors' names begin with; any other patch alone, without."""
    if not info.is_bundle:
        return [("", info)]
    told = [PatchInfo.from_metadata(source["metadata"]) for source in info.sources]
    return [(part_prefix(index), own) for index, own in enumerate(told)]


def _side_of(info: PatchInfo) -> Side:
    """What of a pipeline an exported patch changes."""
    shapes = {name.removeprefix("lora.").removesuffix(".weight"): shape for name, shape in info.shapes.items()}
    if info.component != UNET.component:
        return Side(info.component, shapes, text_layers_by_name(shapes, info.component, info.fingerprint))
    known, whole = layers_by_name(shapes, info.fingerprint), dict(shapes)
    for layers in (layers for layers in known.values() if len(layers) > 1):  # some of them may have no update
        width = next(shapes[layer][1] for layer in layers if layer in shapes)
        rows = zip(layers, rows_of(layers, info.fingerprint), strict=True)
        whole |= {layer: [height, width] for layer, height in rows if layer not in shapes}
    return Side(info.component, whole, known)


def _unpacked(packed: Mapping[str, Any]) -> Tensor:
    content = bytearray(base64.b64decode(packed["data"], validate=True))
    dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}[packed["dtype"]]
    return torch.frombuffer(content, dtype=dtype).reshape(packed["shape"])

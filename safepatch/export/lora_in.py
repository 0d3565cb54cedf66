"""A LoRA file as a patch: what `lora_out` wrote as it was, with its gate; anybody else's as a patch without one."""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safepatch.artifact.info import EXPORTED, PatchInfo
from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.diffusion import UNET, empty_unet, family, fingerprint
from safepatch.errors import ArtifactError, BaseMismatch, ConfigError, SafepatchError, UnsupportedModel
from safepatch.export.names import (
    ADAPTER,
    COMPONENTS,
    DIFFUSERS_FILE,
    EXPORTED_GATE,
    TEXT_ENCODERS,
    layers_by_name,
    text_layers_by_name,
)
from safepatch.models.checkpoint import CONFIGS
from safepatch.models.load import unet_config
from safepatch.models.weights import Weights, open_weights
from safepatch.patch import LoraPatch
from safepatch.patch.lora import linear_layers
from safepatch.taxonomy import Category

PAIRS = (  # suffixes of down and up, of kohya, PEFT, and diffusers before PEFT
    (".lora_down.weight", ".lora_up.weight"),
    (".lora_A.weight", ".lora_B.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
)
FOREIGN = {"dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "hada_": "LoHa", "lokr_": "LoKr", "oft_": "OFT"}
# What reading shapes, numbers and tables that are not what they should be ends in.
DAMAGES = (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, ZeroDivisionError)


def import_lora(
    path: str | Path,
    category: Category | None = None,
    model: str | Path | None = None,
    partly: bool = False,
    license: str = "",
) -> PatchArtifact:
    """A LoRA file as a patch.

    What `export` wrote comes back as it was, with its gate. Anybody else's becomes a patch without a gate: fit one with
    `safepatch gate`, merge it, attack it.

    Args:
        path: a kohya or diffusers LoRA, or the folder of one.
        category: what somebody else's is for; not needed where `export` wrote the file.
        model: what it is for; by default its family, told by the width of its text states.
        partly: leave out what a patch has no place for: text encoders, and layers outside transformer blocks.
        license: of somebody else's; by default what the file states.

    Raises:
        ArtifactError: for an export that was altered since.
        UnsupportedModel: for another kind of file, and for what would be left out.
        BaseMismatch: when it does not fit the model.
        ConfigError: when there is no category.
    """
    path = Path(path)
    weights = open_weights(path / DIFFUSERS_FILE if path.is_dir() else path)
    if EXPORTED in weights.metadata and category is None:
        return _exported(weights)
    if category is None:
        raise ConfigError(f"{path} does not say what it is for; name a category: --category FILE.yaml")
    config = _config_for(weights, model)
    layers = linear_layers(empty_unet(config))
    try:
        tensors, ranks = _factors(weights, layers_by_name(layers, config), layers, partly)
    except SafepatchError:
        raise
    except DAMAGES as error:
        raise UnsupportedModel(f"{weights.path} is damaged ({error}); fetch it again") from error
    rank = max(ranks.values())
    info = PatchInfo(
        kind=LoraPatch.kind,
        instructions={category.name: category.instruction},
        fingerprint=fingerprint(config),
        base={"family": family(config)},
        config={"sees": "prompt", "layout": {"rank": rank}, "imported": path.name},
        shapes={f"lora.{layer}.weight": list(layers[layer]) for layer in ranks},
        title=f"{path.stem} (imported)",
        license=license or weights.metadata.get("modelspec.license", ""),
    )
    return PatchArtifact(tensors, info)


def _unpacked(packed: Mapping[str, Any]) -> Tensor:
    content = bytearray(base64.b64decode(packed["data"], validate=True))
    dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}[packed["dtype"]]
    return torch.frombuffer(content, dtype=dtype).reshape(packed["shape"])


def _exported(weights: Weights) -> PatchArtifact:
    """The patch that `export` was given; its hash says whether it is still that one."""
    try:
        record = json.loads(weights.metadata[EXPORTED])
        info = PatchInfo.from_metadata(record["metadata"])
        gate = json.loads(weights.metadata.get(EXPORTED_GATE, "{}"))
        tensors = {name: _unpacked(packed) for name, packed in gate.items()}
        layers = {name.removeprefix("lora.").removesuffix(".weight"): shape for name, shape in info.shapes.items()}
        if info.component == UNET.component:
            known = layers_by_name(layers, info.fingerprint)
        else:
            known = text_layers_by_name(layers, info.component, info.fingerprint)
        read, _ = _factors(weights, known, layers, partly=False, dtype=None)
        artifact = PatchArtifact({**tensors, **read}, info)
    except DAMAGES as error:
        raise ArtifactError(f"{weights.path} is damaged: what it says of its patch cannot be read ({error})") from error
    if artifact.content_hash != record["hash"]:
        raise ArtifactError(
            f"{weights.path} is no longer the patch that was exported: its weights or its metadata were changed; "
            "import it as somebody else's LoRA, with --category"
        )
    return artifact


def _config_for(weights: Weights, model: str | Path | None) -> Mapping[str, Any]:
    """The UNet that a LoRA is for."""
    if model is not None:
        return unet_config(model)
    widths = {
        stored.shape[1]
        for name, stored in weights.tensors.items()
        if "attn2" in name and ("to_k" in name or "to_v" in name) and name.endswith(tuple(down for down, _ in PAIRS))
    }
    names = {family({"cross_attention_dim": width}) for width in widths}
    name = names.pop() if len(names) == 1 else "unknown"
    if not (CONFIGS / f"{name}.json").is_file():
        raise UnsupportedModel(f"{weights.path} does not tell its family; name a model that it is for: --model")
    return json.loads((CONFIGS / f"{name}.json").read_text("utf-8"))["unet"]


def _factors(
    weights: Weights,
    known: Mapping[str, str],
    shapes: Mapping[str, Sequence[int]],
    partly: bool,
    dtype: torch.dtype | None = torch.float32,
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """A patch's tensors, and the ranks of its layers.

    Args:
        weights: of the file.
        known: the layer of each name that a file may have.
        shapes: (out, in) of each layer.
        partly: leave out what no layer takes.
        dtype: of the factors; None as they are stored, of which the scale must be 1.
    """
    tensors, ranks, left, settings = {}, dict[str, int](), set(weights.tensors), _settings(weights)
    for name in weights.tensors:
        if kind := next((kind for mark, kind in FOREIGN.items() if mark in name), None):
            raise UnsupportedModel(f"{weights.path} is a {kind} ('{name}'); only plain LoRA is read")
        found = next(((name.removesuffix(down), down, up) for down, up in PAIRS if name.endswith(down)), None)
        layer = known.get(found[0]) if found else None
        if found is None or layer is None:
            continue
        stem, down_suffix, up_suffix = found
        up_name, alpha_name = f"{stem}{up_suffix}", f"{stem}.alpha"
        if up_name not in weights.tensors:
            raise UnsupportedModel(f"{weights.path} lacks '{up_name}'; fetch the whole file")
        down, up = (weights.read(each).flatten(1) for each in (f"{stem}{down_suffix}", up_name))  # 1 x 1 kernels too
        if [len(up), down.shape[1]] != [*shapes[layer]] or len(down) != up.shape[1]:
            raise BaseMismatch(f"'{stem}' has another size in this model; name the model that it is for: --model")
        alpha = float(weights.read(alpha_name)) if alpha_name in weights.tensors else None
        scale = settings.scale(layer, len(down), alpha)
        if dtype:
            down, up = down.to(dtype), scale * up.to(dtype)
        tensors |= {f"lora.{layer}.weight.down": down.contiguous(), f"lora.{layer}.weight.up": up.contiguous()}
        ranks[layer] = len(down)
        left -= {name, up_name, alpha_name}
    if left and not partly:
        what = "a text encoder's layers" if any(n.startswith(TEXT_ENCODERS) for n in left) else "layers"
        raise UnsupportedModel(
            f"{weights.path} has {what} that a lora patch has no place for ({len(left)} tensors, '{min(left)}'); "
            "--partly leaves them out"
        )
    if not ranks:
        raise UnsupportedModel(f"{weights.path} has no LoRA of a layer that this model has; name another --model")
    return tensors, ranks


class _Settings:
    """PEFT's, of a file that states them."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        named = [(key.partition("."), value) for key, value in values.items() if key.startswith(COMPONENTS)]
        self._of = {rest: value for (_, _, rest), value in named}

    def scale(self, layer: str, rank: int, alpha: float | None) -> float:
        """alpha / rank, or by rank-stabilised LoRA (Kalajdzievski 2023, arXiv 2312.03732) alpha / sqrt(rank)."""
        if alpha is None:
            alpha = (self._of.get("alpha_pattern") or {}).get(layer, self._of.get("lora_alpha"))
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self._of.get("use_rslora") else rank)


def _settings(weights: Weights) -> _Settings:
    try:
        found = json.loads(weights.metadata.get(ADAPTER, "{}"))
    except ValueError:
        found = {}
    return _Settings(found if isinstance(found, dict) else {})

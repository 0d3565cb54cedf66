"""A lora patch as a LoRA file that other programs load, and that holds the patch.

Both hold the same factors. What a LoRA has no place for (category, gate, threshold, licence, hash) travels in the
file's metadata, from which `lora_in` gives the same patch back, to the last bit. Programs that know nothing of it apply
the LoRA to every prompt, negative ones too: always on, as `fuse` is.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from safepatch.artifact.container import raw_bytes
from safepatch.artifact.info import EXPORTED
from safepatch.artifact.patch_artifact import Factors, PatchArtifact, is_gate
from safepatch.diffusion import UNET, config_kind, family
from safepatch.errors import ConfigError, lookup
from safepatch.export.joined import join, original_layers, rows_of
from safepatch.export.names import (
    ADAPTER,
    DIFFUSERS_FILE,
    EXPORTED_GATE,
    GUARD,
    kohya_name,
    peft_name,
    text_name,
)
from safepatch.export.sides import Changed, changed_by
from safepatch.files import replacing, unwritable

FORMATS = ("kohya", "diffusers")
VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0", "flux": "flux1"}  # kohya's
ARCHITECTURES = {
    "sd1": "stable-diffusion-v1/lora",
    "sd2": "stable-diffusion-v2-512/lora",
    "sdxl": "stable-diffusion-xl-v1-base/lora",
    "sd3": "stable-diffusion-3/lora",
    "flux": "flux-1/lora",
}  # ModelSpec's
NETWORKS = {"sd3": "networks.lora_sd3", "flux": "networks.lora_flux"}  # kohya's, beside `networks.lora`
NOTE = (
    "A safety patch as a LoRA. In programs that know no gate it acts on every prompt, on the negative one too; "
    "`safepatch import` makes it the gated patch again."
)


def export(patch: str | Path, out: str | Path, form: str = "kohya") -> Path:
    """Write a lora patch as a LoRA that other programs load.

    Args:
        patch: path of a lora patch that has factors, single, merged by cat, or a bundle of one for each component.
        out: of `kohya`, a .safetensors file; of `diffusers`, a folder that `load_lora_weights` takes.
        form: a member of `FORMATS`.

    Returns:
        The file that was written.

    Raises:
        UnknownName: for another form.
        ConfigError: for a patch that has no such form.
        SafepatchError: when the file cannot be written.
    """
    lookup(dict.fromkeys(FORMATS), form, what="format")
    artifact = PatchArtifact.open(patch)
    sides, config = changed_by(artifact), artifact.info.fingerprint
    path = Path(out) if form == "kohya" else Path(out) / DIFFUSERS_FILE
    if path.suffix != ".safetensors":
        raise ConfigError(f"a kohya LoRA is one .safetensors file, not {path}; choose another -o")
    tensors: dict[str, Tensor] = {}
    for side in sides:
        tensors |= _kohya_tensors(side, config) if form == "kohya" else _peft_tensors(side)
    if form == "kohya" and family(config) == "sd3":  # diffusers knows no such names, and would go on without them
        tensors[GUARD] = torch.zeros(1)
    told = _kohya_metadata(sides, config, path.stem) if form == "kohya" else _peft_metadata(sides)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(save(tensors, _metadata(artifact, sides, form) | told))
    except OSError as error:
        raise unwritable(path, error) from error
    return path


def _kohya_tensors(side: Changed, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Under the names of the original layout where kohya has those, in which layers of a transformer are joined."""
    if side.component == UNET.component:
        named = {kohya_name(layer, config): each for layer, each in side.factors.items()}
    elif config_kind(config) is UNET:
        named = {text_name(layer, side.component, config): each for layer, each in side.factors.items()}
    else:
        named = _joined(side.factors, config)
    tensors = {}
    for name, (up, down) in named.items():
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        tensors[f"{name}.alpha"] = torch.tensor(side.weight * len(down), dtype=down.dtype)  # its scale is alpha / rank
    return tensors


def _joined(factors: Mapping[str, Factors], config: Mapping[str, Any]) -> dict[str, Factors]:
    found = {}
    for name, layers in original_layers(factors, config).items():
        parts = [factors.get(layer) for layer in layers]
        found[name] = join(parts, rows_of(layers, config)) if len(parts) > 1 else factors[layers[0]]
    return found


def _peft_tensors(side: Changed) -> dict[str, Tensor]:
    tensors = {}
    for layer, (up, down) in side.factors.items():
        name = peft_name(layer, side.component)
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    return tensors


def _metadata(artifact: PatchArtifact, sides: Sequence[Changed], form: str) -> dict[str, str]:
    """All of the patch that a LoRA has no place for."""
    info = artifact.info
    is_joined = form == "kohya" and config_kind(info.fingerprint) is not UNET
    joined = {"ranks": sides[0].ranks} if is_joined else {}
    gate = {key: _packed(tensor) for key, tensor in artifact.tensors.items() if is_gate(key)}
    record = {"metadata": info.to_metadata(), "hash": artifact.content_hash, **joined}
    metadata = {
        "format": "pt",
        "modelspec.title": info.title,
        "modelspec.license": info.license,
        "modelspec.description": NOTE,
        EXPORTED: json.dumps(record, sort_keys=True),
        EXPORTED_GATE: json.dumps(gate, sort_keys=True) if gate else "",
    }
    return {key: value for key, value in metadata.items() if value}


def _kohya_metadata(sides: Sequence[Changed], config: Mapping[str, Any], name: str) -> dict[str, str]:
    """What user interfaces show and ask for."""
    kind, usual = family(config), str(_usual([rank for side in sides for rank in side.ranks.values()]))
    metadata = {
        "modelspec.architecture": ARCHITECTURES.get(kind, ""),
        "ss_base_model_version": VERSIONS.get(kind, ""),
        "ss_v2": str(kind == "sd2"),
        "ss_network_module": NETWORKS.get(kind, "networks.lora"),
        "ss_network_dim": usual,
        "ss_network_alpha": usual,
        "ss_output_name": name,
    }
    return {key: value for key, value in metadata.items() if value}


def _peft_metadata(sides: Sequence[Changed]) -> dict[str, str]:
    """PEFT's settings of each component; of its layers the ends suffice: some classes wrap them."""
    settings = {}
    for component, weight, ranks in ((side.component, side.weight, side.ranks) for side in sides):
        usual = _usual(list(ranks.values()))
        others = {layer: rank for layer, rank in ranks.items() if rank != usual}
        own = {"r": usual, "lora_alpha": weight * usual, "rank_pattern": others}
        own |= {"alpha_pattern": {layer: weight * rank for layer, rank in others.items()}}
        own |= {"target_modules": sorted(ranks), "peft_type": "LORA"}
        settings |= {f"{component}.{key}": value for key, value in own.items()}
    return {ADAPTER: json.dumps(settings, sort_keys=True)}


def _usual(ranks: Sequence[int]) -> int:
    return max(set(ranks), key=list(ranks).count)


def _packed(tensor: Tensor) -> dict[str, Any]:
    content = base64.b64encode(bytes(raw_bytes(tensor))).decode()
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch."), "data": content}

"""A lora patch as a LoRA file that other programs load, and that holds the patch.

Both hold the same factors. What a LoRA has no place for (category, gate, threshold, licence, hash) travels in the
file's metadata, from which `lora_in` gives the same patch back, to the last bit. Programs that know nothing of it apply
the LoRA to every prompt, negative ones too: always on, as `fuse` is.
"""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from safepatch.artifact.container import raw_bytes
from safepatch.artifact.info import EXPORTED
from safepatch.artifact.patch_artifact import Factors, PatchArtifact
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
from safepatch.files import replacing, unwritable
from safepatch.patch import LoraPatch
from safepatch.patch.lora import GATE, updated_weights

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
        patch: path of a lora patch that has factors, single or merged by cat.
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
    config = _config_of(artifact)
    factors, component = _factors(artifact), _component(artifact)
    if form == "kohya":
        path, tensors = Path(out), _kohya_tensors(factors, component, config)
        if path.suffix != ".safetensors":
            raise ConfigError(f"a kohya LoRA is one .safetensors file, not {path}; choose another -o")
    else:
        path, tensors = Path(out) / DIFFUSERS_FILE, _peft_tensors(factors, component)
    metadata = _metadata(artifact, path, {name: len(each.down) for name, each in factors.items()}, form)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(save(tensors, metadata))
    except OSError as error:
        raise unwritable(path, error) from error
    return path


def _config_of(artifact: PatchArtifact) -> Mapping[str, Any]:
    """The architecture that a patch is for; raises `ConfigError` where there is no such LoRA."""
    info = artifact.info
    if info.is_bundle:
        raise ConfigError("a bundle is several patches; export its parts (safepatch split), or merge them by cat")
    if info.kind != LoraPatch.kind:
        nor = ", nor a ControlNet, which would not read its instruction" if info.kind == "control" else ""
        raise ConfigError(
            f"a {info.kind} patch is a network of its own and no LoRA{nor}; train one with patch.kind=lora, or in "
            "ComfyUI use safepatch's nodes (integrations/comfyui)"
        )
    if dense := [name for name in updated_weights(artifact) if artifact.rank(f"lora.{name}") is None]:
        raise ConfigError(f"'{dense[0]}' has no factors after this merge; merge by cat, or train one patch")
    return info.fingerprint


def _component(artifact: PatchArtifact) -> str:
    """What diffusers calls the part of a model that the patch changes."""
    component = artifact.info.component
    return config_kind(artifact.info.fingerprint).component if component == UNET.component else component


def _factors(artifact: PatchArtifact) -> dict[str, Factors]:
    """By layer, in the shapes that others have them in: of a convolution, both are kernels."""
    found = {}
    for name in updated_weights(artifact):
        (up, down), kernel = artifact.factors(f"lora.{name}"), artifact.info.shapes[f"lora.{name}"][2:]
        if kernel:
            up, down = up[:, :, None, None], down.reshape(len(down), -1, *kernel)
        found[name.removesuffix(".weight")] = Factors(up, down)
    return found


def _kohya_tensors(factors: Mapping[str, Factors], component: str, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Under the names of the original layout where kohya has those, in which layers of a transformer are joined."""
    if component == UNET.component:
        named = {kohya_name(layer, config): each for layer, each in factors.items()}
    elif config_kind(config) is UNET:
        named = {text_name(layer, component, config): each for layer, each in factors.items()}
    else:
        named = _joined(factors, config)
    tensors = {}
    for name, (up, down) in named.items():
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        tensors[f"{name}.alpha"] = torch.tensor(float(len(down)), dtype=down.dtype)  # its scale is alpha / rank, so 1
    if family(config) == "sd3":  # diffusers knows no such names of its layers, and would go on without them
        tensors[GUARD] = torch.zeros(1)
    return tensors


def _joined(factors: Mapping[str, Factors], config: Mapping[str, Any]) -> dict[str, Factors]:
    found = {}
    for name, layers in original_layers(factors, config).items():
        parts = [factors.get(layer) for layer in layers]
        found[name] = join(parts, rows_of(layers, config)) if len(parts) > 1 else factors[layers[0]]
    return found


def _peft_tensors(factors: Mapping[str, Factors], component: str) -> dict[str, Tensor]:
    tensors = {}
    for layer, (up, down) in factors.items():
        name = peft_name(layer, component)
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    return tensors


def _metadata(artifact: PatchArtifact, path: Path, ranks: Mapping[str, int], form: str) -> dict[str, str]:
    """What programs show and ask for, and all of the patch that a LoRA has no place for."""
    own, name = artifact.info.to_metadata(), family(artifact.info.fingerprint)
    usual = max(set(ranks.values()), key=list(ranks.values()).count)
    joined = {"ranks": ranks} if form == "kohya" and config_kind(artifact.info.fingerprint) is not UNET else {}
    gate = {key: _packed(tensor) for key, tensor in artifact.tensors.items() if key.startswith(GATE)}
    metadata = {
        "format": "pt",
        "modelspec.title": artifact.info.title,
        "modelspec.license": artifact.info.license,
        "modelspec.description": NOTE,
        EXPORTED: json.dumps({"metadata": own, "hash": artifact.content_hash, **joined}, sort_keys=True),
        EXPORTED_GATE: json.dumps(gate, sort_keys=True) if gate else "",
    }
    if form == "kohya":
        metadata |= {
            "modelspec.architecture": ARCHITECTURES.get(name, ""),
            "ss_base_model_version": VERSIONS.get(name, ""),
            "ss_v2": str(name == "sd2"),
            "ss_network_module": NETWORKS.get(name, "networks.lora"),
            "ss_network_dim": str(usual),
            "ss_network_alpha": str(usual),
            "ss_output_name": path.stem,
        }
    else:
        others = {layer: rank for layer, rank in ranks.items() if rank != usual}
        settings = {"r": usual, "lora_alpha": usual, "rank_pattern": others, "alpha_pattern": others}
        settings |= {"target_modules": sorted(ranks), "peft_type": "LORA"}
        component = _component(artifact)  # of its layers the ends suffice: some classes wrap them
        metadata[ADAPTER] = json.dumps({f"{component}.{key}": value for key, value in settings.items()}, sort_keys=True)
    return {key: value for key, value in metadata.items() if value}


def _packed(tensor: Tensor) -> dict[str, Any]:
    content = base64.b64encode(bytes(raw_bytes(tensor))).decode()
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch."), "data": content}

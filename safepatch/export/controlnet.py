"""A control patch as a ControlNet that other programs load: the model's encoder with the patch's deltas in it.

A ControlNet (Zhang et al. 2023, arXiv 2302.05543) is told latents, timestep and prompt, and a hint image. So only a
patch that sees the prompt alone is one; whatever its hint, the network that reads it is zeros. Other programs know no
gate: there it acts on every prompt, on negative ones too.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safepatch.artifact.container import Header
from safepatch.artifact.info import CONTROLNET, PatchInfo
from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.artifact.writer import data_of
from safepatch.diffusion import UNET, Components, config_kind, empty_controlnet, uncompiled
from safepatch.errors import ConfigError
from safepatch.export.names import original_path
from safepatch.files import replacing, unwritable, write_text
from safepatch.patch.clone import latent_channels
from safepatch.patch.control import ControlPatch
from safepatch.patch.files import from_artifact
from safepatch.progress import bar

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
HINT = "controlnet_cond_embedding."
ORIGINAL_HALVINGS = 3  # of a hint's edge, in the original layout
NOTE = (
    "A safety patch as a ControlNet, for any hint image. It holds weights of the model that it was made on, whose "
    "licence holds for it. It has no gate: it acts on every prompt, on the negative one too."
)
# What diffusers calls the layers outside the blocks -> the original layout.
ORIGINAL = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "controlnet_mid_block": "middle_block_out.0",
    f"{HINT}conv_in": "input_hint_block.0",
    f"{HINT}conv_out": "input_hint_block.14",
}


def export_controlnet(patch: str | Path, out: str | Path, pipe: Any) -> Path:
    """Write a control patch as a ControlNet for the model of `pipe`, in the dtype of its weights.

    Args:
        patch: path of a control patch of a UNet that sees the prompt alone, single or merged into one.
        out: a folder that diffusers' `ControlNetModel.from_pretrained` takes, or a .safetensors file in the original
            layout, which user interfaces read.
        pipe: a pipeline of the model, which is only read.

    Returns:
        The file with the weights.

    Raises:
        ConfigError: for a patch, or a model, that has no such form.
        BaseMismatch: when the patch is for another architecture.
        SafepatchError: when the file cannot be written.
    """
    artifact, path = PatchArtifact.open(patch), Path(out)
    require_controlnet(artifact.info)
    net, tensors = _controlnet(artifact, Components.of(pipe))
    metadata = _metadata(artifact)
    if path.suffix == ".safetensors":
        return _write(path, _original(tensors, net.config), metadata)
    weights = _write(path / WEIGHTS_FILE, tensors, metadata)
    write_text(path / "config.json", net.to_json_string())
    return weights


def require_controlnet(info: PatchInfo) -> None:
    """Raise `ConfigError` unless a patch does what a ControlNet can do."""
    sees = info.config.get("sees")
    if info.is_bundle:
        raise ConfigError("a bundle is several patches; export its parts (safepatch split), programs take several")
    if info.kind != ControlPatch.kind:
        raise ConfigError(f"a {info.kind} patch is no ControlNet; train one with patch.kind=control patch.sees=prompt")
    if config_kind(info.fingerprint) is not UNET:
        raise ConfigError("not supported yet: a ControlNet of SD3 or Flux; use the patch itself (safepatch.apply)")
    if sees != "prompt":
        raise ConfigError(
            f"this patch sees '{sees}', and a ControlNet is told the prompt alone; train one with patch.sees=prompt, "
            "or use the patch itself (safepatch.apply; in ComfyUI, integrations/comfyui)"
        )


def _controlnet(artifact: PatchArtifact, components: Components) -> tuple[Any, dict[str, Tensor]]:
    """An empty one of diffusers', for its configuration, and the weights by its names."""
    unet = components.unet
    halvings = len(uncompiled(components.vae).config.block_out_channels) - 1
    net = empty_controlnet(unet.config, latent_channels(unet), halvings)
    module = from_artifact(artifact, unet, components.compute_dtype)
    tensors: dict[str, Tensor] = {
        _name(name): weight for name, weight in module.named_parameters() if not name.startswith("gate.")
    }
    shapes = {name: weight.shape for name, weight in net.named_parameters()}
    tensors |= {
        name: torch.zeros(shape, dtype=components.compute_dtype)
        for name, shape in shapes.items()
        if name.startswith(HINT)
    }
    own = {name: weight.shape for name, weight in tensors.items()}
    if apart := own.items() ^ shapes.items():
        raise ConfigError(f"a ControlNet has no such '{min(name for name, _ in apart)}' as this model; use the patch")
    return net, tensors


def _name(name: str) -> str:
    """Of a parameter of the patch, in diffusers' ControlNets."""
    own = name.removeprefix("clone.").replace("zero_mid.", "controlnet_mid_block.")
    return own.replace("zero_down.", "controlnet_down_blocks.")


def _original(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The same tensors under the names of the original layout."""
    if len(config["conditioning_embedding_out_channels"]) != ORIGINAL_HALVINGS + 1:
        raise ConfigError("this model's latents are no eighth of its images, as one file needs; give -o a folder")
    return {_original_name(name, config): tensor for name, tensor in tensors.items()}


def _original_name(name: str, config: Mapping[str, Any]) -> str:
    layer, _, form = name.rpartition(".")
    if layer in ORIGINAL:
        path = ORIGINAL[layer]
    elif layer.startswith("controlnet_down_blocks."):
        path = f"zero_convs.{layer.rpartition('.')[2]}.0"
    elif layer.startswith(HINT):  # numbered with the activations between them
        path = f"input_hint_block.{2 * int(layer.rpartition('.')[2]) + 2}"
    else:
        path = original_path(layer, config)
    return f"{path}.{form}"


def _metadata(artifact: PatchArtifact) -> dict[str, str]:
    """What it is, and of which patch."""
    own = {"metadata": artifact.info.to_metadata(), "hash": artifact.content_hash}
    return {
        "format": "pt",
        "modelspec.title": artifact.info.title,
        "modelspec.description": NOTE,
        CONTROLNET: json.dumps(own, sort_keys=True),
    }


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """A safetensors file, one tensor after the other."""
    header = Header.of(metadata, tensors)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(header.prefix + header.text)
            for piece in bar(data_of(tensors, tensors), total=len(tensors), desc="writing"):
                file.write(piece)
    except OSError as error:
        raise unwritable(path, error) from error
    return path

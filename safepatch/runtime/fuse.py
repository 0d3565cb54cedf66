"""Write a lora patch into a model's weights, for hosts that run no safepatch: the result is a plain checkpoint.

What is fused acts in every row of every call and cannot be taken off, scaled or checked by fail-closed. In particular a
negative prompt that names the unsafe concept is answered by the patched model too, where `apply` leaves it alone.
"""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from safepatch.artifact import PatchArtifact
from safepatch.container import canonical_json
from safepatch.diffusion import Components, denoiser_entry, original_names, read_json
from safepatch.errors import ConfigError, ModelNotFound, SafepatchError
from safepatch.patch import LoraPatch
from safepatch.patch.files import check_fits
from safepatch.runtime.check import require_fit
from safepatch.runtime.checkpoint import open_checkpoint
from safepatch.runtime.load import load_tiny
from safepatch.tiny.models import MODELS

NOTE = "fused.safepatch"  # metadata key of a fused file, and name of the note in a fused folder


@torch.no_grad()
def fuse(pipe: Any, patch: str | Path | PatchArtifact, scale: float = 1.0) -> None:
    """Add a lora patch to the weights of a pipeline's denoiser, for good.

    Args:
        pipe: a diffusers pipeline; its weights keep their dtype.
        patch: path of an artifact, or an opened one; a bundle of lora patches counts as their sum.
        scale: strength, 0 or more.

    Raises:
        ConfigError: for a patch of another kind, which is a network of its own, or a scale below 0.
        BaseMismatch: when the patch was made for another architecture.
    """
    artifact = patch if isinstance(patch, PatchArtifact) else PatchArtifact.open(patch)
    host = Components.of(pipe).unet
    check_fits(artifact.info, host.config)
    weights = {name.replace(".base_layer", ""): weight for name, weight in host.named_parameters()}
    for name, delta in layer_deltas(artifact, scale).items():
        weights[name].copy_(_sum(weights[name], delta))


def fuse_model(
    model: str | Path, patch: str | Path, out: str | Path, scale: float = 1.0, allow_pickle: bool = False
) -> Path:
    """A copy of a model with a lora patch in its weights; everything else in it stays byte for byte.

    Args:
        model: an embedded model, a diffusers folder, or a single file in the original layout.
        patch: path of the patch.
        out: where the copy goes: a new folder, or for a single file a `.safetensors` file, replaced all or nothing.
        scale: strength, 0 or more.
        allow_pickle: open a `.ckpt` too, with torch's restricted loader.

    Raises:
        ConfigError: as `fuse`.
        BaseMismatch: when the patch was made for another architecture.
        ModelNotFound: when there is no such model here; a Hub id has to be downloaded first.
        SafepatchError: when `out` is no place for it.
    """
    model, out = Path(model), Path(out)
    _, config = require_fit(str(model), patch, allow_pickle)
    artifact = PatchArtifact.open(patch)
    deltas = layer_deltas(artifact, scale)
    note = {"title": artifact.info.title, "categories": artifact.info.categories, "scale": scale}
    note = canonical_json({**note, "hash": artifact.content_hash})
    try:
        if model.is_file():
            return _fuse_file(model, out, deltas, note, config, allow_pickle)
        if out.exists():
            raise SafepatchError(f"{out} exists already; give a new folder")
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent) as folder:
            copy = _copied(model, Path(folder) / "model")
            (copy / f"{NOTE}.json").write_text(note + "\n", encoding="utf-8")
            component, _ = denoiser_entry(read_json(copy / "model_index.json"))
            _fuse_folder(copy / component, deltas)
            return copy.rename(out)
    except OSError as error:
        raise SafepatchError(f"cannot write {out} ({error.strerror or error}); choose another -o") from error


def layer_deltas(artifact: PatchArtifact, scale: float) -> dict[str, Tensor]:
    """What a lora patch, or a bundle of such, adds to each weight of the host, by name, (out, in) float32."""
    if not scale >= 0:
        raise ConfigError(f"scale must be 0 or more, not {scale}")
    deltas: dict[str, Tensor] = {}
    for part in artifact.parts():
        kind = part.artifact.info.kind
        if kind != LoraPatch.kind:
            raise ConfigError(f"a {kind} patch is a network of its own and has no weights to fuse; use apply")
        for name, delta in part.artifact.deltas().items():
            own = name.removeprefix(f"{kind}.")
            deltas[own] = deltas.get(own, 0) + scale * part.weight * delta
    return deltas


def _sum(weight: Tensor, delta: Tensor) -> Tensor:
    """In float32, rounded once; 1 x 1 convolutions of the original layout keep their shape."""
    return (weight.float() + delta.to(weight.device).reshape(weight.shape)).to(weight.dtype)


def _copied(model: Path, target: Path) -> Path:
    """The folder of a model, copied; an embedded sibling, which has none, is saved."""
    if str(model) in MODELS:
        load_tiny(str(model)).save_pretrained(target)
        return target
    if not model.is_dir():
        raise ModelNotFound(f"no folder or file at {model}; download a Hub model first, then give its folder")
    return Path(shutil.copytree(model, target))


def _fuse_folder(component: Path, deltas: Mapping[str, Tensor]) -> None:
    """Change the component's weight files in place."""
    left = dict(deltas)
    for path in sorted(component.glob("*.safetensors")):
        tensors, metadata = _read(path)
        found = {name: left.pop(name) for name in left.keys() & tensors.keys()}
        if found:
            save_file(
                {**tensors, **{name: _sum(tensors[name], delta) for name, delta in found.items()}}, path, metadata
            )
    if left:
        raise SafepatchError(f"{component} holds no '{min(left)}' as .safetensors; save the model as safetensors first")


def _fuse_file(
    model: Path, out: Path, deltas: Mapping[str, Tensor], note: str, config: Mapping[str, Any], allow_pickle: bool
) -> Path:
    if out.suffix != ".safetensors" or out.resolve() == model.resolve():
        raise SafepatchError(f"a single file is fused into another .safetensors file, not {out}; choose another -o")
    open_checkpoint(model, allow_pickle)
    tensors, metadata = _read(model)
    names = original_names(tensors, config)
    fused = {names[name]: _sum(tensors[names[name]], delta) for name, delta in deltas.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        save_file({**tensors, **fused}, Path(folder) / out.name, {**metadata, NOTE: note})
        return (Path(folder) / out.name).replace(out)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if path.suffix != ".safetensors":
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        tensors = tensors.get("state_dict", tensors)
        return {name: tensor.clone() for name, tensor in tensors.items() if isinstance(tensor, Tensor)}, {
            "format": "pt"
        }
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        return {name: file.get_tensor(name) for name in names}, file.metadata() or {"format": "pt"}

"""Write a lora patch into a model's weights, for hosts that run no safepatch: the result is a plain checkpoint.

What is fused acts in every row of every call, whatever a gate would say, and cannot be taken off, scaled or checked by
fail-closed. In particular a negative prompt that names the unsafe concept is answered by the patched model too, where
`apply` leaves it alone.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from safepatch.artifact.container import raw_bytes
from safepatch.artifact.patch_artifact import Part, PatchArtifact
from safepatch.diffusion import Components, denoiser_entry, original_names, read_json
from safepatch.errors import BaseMismatch, ConfigError, ModelNotFound, SafepatchError
from safepatch.models.load import MODELS, load_tiny
from safepatch.patch import LoraPatch
from safepatch.patch.files import check_fits
from safepatch.patch.lora import updated_weights
from safepatch.runtime.check import require_fit
from safepatch.runtime.handle import refuse_fused_projections

NOTE = "fused.safepatch"  # metadata key of a fused file; a fused folder has a file of that name, and .json
OTHER_WEIGHTS = ("*.bin", "*.bin.index*.json", "*.msgpack", "*.h5", "*.ckpt", "*.pth")  # none of them would be patched


class Update(NamedTuple):
    """What a lora patch, or a bundle of such, adds to a host.

    Attributes:
        parts: the patches.
        scale: strength of all.
    """

    parts: tuple[Part, ...]
    scale: float

    @classmethod
    def of(cls, artifact: PatchArtifact, scale: float) -> "Update":
        """The update that `artifact` stands for; raises `ConfigError` for another kind or a scale below 0."""
        if not 0 <= scale < float("inf"):
            raise ConfigError(f"scale must be 0 or more, not {scale}")
        for part in artifact.parts():
            kind = part.artifact.info.kind
            if kind != LoraPatch.kind:
                raise ConfigError(f"a {kind} patch is a network of its own and has no weights to fuse; use apply")
        return cls(artifact.parts(), scale)

    @property
    def names(self) -> set[str]:
        """The weights of the host that change."""
        return {name for part in self.parts for name in updated_weights(part.artifact)}

    @property
    def digest(self) -> str:
        """SHA-256 of what is added; gates in front of the parts, and so their order in a bundle, make no difference."""
        return f"0x{sha256(b''.join(sorted(map(_digest, self.parts)))).hexdigest()}"

    def delta(self, name: str) -> Tensor:
        """What is added to weight `name`, (out, in) float32."""
        own = f"lora.{name}"
        held = [part for part in self.parts if own in part.artifact.parameter_names()]
        return sum((self.scale * part.weight * part.artifact.delta(own) for part in held), torch.zeros(()))

    def added(self, name: str, weight: Tensor) -> Tensor:
        """`weight`, the host's of that name, with the update: summed in float32, rounded once."""
        delta = self.delta(name).to(weight.device)
        return (weight.float() + delta.reshape(weight.shape)).to(weight.dtype).contiguous()

    def require(self, weights: Mapping[str, Tensor]) -> None:
        """Raise, before anything is written, unless every weight is there and can take a small difference."""
        missing = sorted(self.names - weights.keys())
        if missing:
            raise BaseMismatch(f"this patch changes '{missing[0]}', which this model lacks; use it on its own family")
        for name in sorted(self.names):
            weight = weights[name]
            if weight.is_meta or not weight.is_floating_point() or weight.dtype.itemsize < 2:
                where = "offloaded layer by layer" if weight.is_meta else f"stored as {weight.dtype}"
                raise ConfigError(f"'{name}' is {where} and cannot take a patch; fuse before offloading or quantizing")


def _digest(part: Part) -> bytes:
    seen = sha256(repr(part.weight).encode())
    for name in sorted(updated_weights(part.artifact)):
        for form, tensor in sorted(part.artifact.stored(f"lora.{name}").items()):
            seen.update(f"{name}.{form}".encode())
            seen.update(raw_bytes(tensor))
    return seen.digest()


@torch.no_grad()
def fuse(pipe: Any, patch: str | Path | PatchArtifact, scale: float = 1.0) -> None:
    """Add a lora patch to the weights of a pipeline's denoiser, for good.

    Args:
        pipe: a diffusers pipeline; its weights keep their dtype.
        patch: path of an artifact, or an opened one; a bundle of lora patches counts as their sum.
        scale: strength, 0 or more.

    Raises:
        ConfigError: for a patch of another kind, a scale below 0, or weights that cannot be written; none is then.
        BaseMismatch: when the patch was made for another architecture.
    """
    artifact = patch if isinstance(patch, PatchArtifact) else PatchArtifact.open(patch)
    host: Any = Components.of(pipe).unet
    check_fits(artifact.info, host.config)
    refuse_fused_projections(host)
    update = Update.of(artifact, scale)
    weights = {name.replace(".base_layer", ""): weight for name, weight in host.named_parameters()}
    update.require(weights)
    for name in update.names:
        weights[name].copy_(update.added(name, weights[name]))


def fuse_model(
    model: str | Path, patch: str | Path, out: str | Path, scale: float = 1.0, allow_pickle: bool = False
) -> Path:
    """A copy of a model with a lora patch in its weights; everything else in it stays byte for byte.

    Left out of the copy, because they would be unpatched: weights of the same component in other formats than
    safetensors, and a single file's second, averaged UNet (`model_ema`).

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
        SafepatchError: when `out` is no place for it, or the patch was fused into the model before.
    """
    model, out = Path(model), Path(out)
    if str(model) not in MODELS and not model.exists():
        raise ModelNotFound(f"no folder or file at {model}; download a Hub model first, then give its folder")
    _, config = require_fit(str(model), patch, allow_pickle)
    artifact = PatchArtifact.open(patch)
    update = Update.of(artifact, scale)
    note = {"title": artifact.info.title, "categories": artifact.info.categories, "scale": scale}
    note |= {"hash": artifact.content_hash, "weights": update.digest}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if model.is_file():
            return _fuse_file(model, out, update, note, config)
        if out.exists():
            raise SafepatchError(f"{out} exists already; give a new folder")
        with tempfile.TemporaryDirectory(dir=out.parent) as folder:
            return _fuse_folder(_copied(model, Path(folder) / "model"), update, note).rename(out)
    except OSError as error:
        raise SafepatchError(f"cannot write {out} ({error.strerror or error}); choose another -o") from error
    except SafetensorError as error:
        raise SafepatchError(f"{model} holds a damaged file ({error}); fetch it again") from error


def _copied(model: Path, target: Path) -> Path:
    """The folder of a model, copied; an embedded sibling, which has none, is saved."""
    if str(model) in MODELS:
        load_tiny(str(model)).save_pretrained(target)
        return target
    return Path(shutil.copytree(model, target, copy_function=shutil.copyfile))


def _fuse_folder(folder: Path, update: Update, note: dict[str, Any]) -> Path:
    """Change the weights of the component that denoises, in every variant of them that is there."""
    component, _ = denoiser_entry(read_json(folder / "model_index.json"))
    for pattern in OTHER_WEIGHTS:
        for path in (folder / component).glob(pattern):
            path.unlink()
    variants: dict[str, list[Path]] = {}
    for path in sorted((folder / component).glob("*.safetensors")):
        variants.setdefault(_variant(path), []).append(path)
    if not variants:
        raise SafepatchError(f"{component}/ holds no .safetensors weights; save the model as safetensors first")
    for paths in variants.values():
        files = {path: _read(path) for path in paths}
        update.require({name: tensor for tensors, _ in files.values() for name, tensor in tensors.items()})
        for path, (tensors, metadata) in files.items():
            changed = {name: update.added(name, tensors[name]) for name in update.names & tensors.keys()}
            save_file({**tensors, **changed}, path, metadata)
    path = folder / f"{NOTE}.json"
    path.write_text(_with_note(path.read_text("utf-8") if path.is_file() else "[]", note) + "\n", "utf-8")
    return folder


def _variant(path: Path) -> str:
    """`fp16` of `model.fp16.safetensors` and of `model.fp16-00001-of-00002.safetensors`; empty for plain weights."""
    middle = path.name.split(".")[1:-1]
    return middle[0].partition("-")[0] if middle else ""


def _fuse_file(model: Path, out: Path, update: Update, note: dict[str, Any], config: Mapping[str, Any]) -> Path:
    if out.suffix != ".safetensors" or out.resolve() == model.resolve():
        raise SafepatchError(f"a single file is fused into another .safetensors file, not {out}; choose another -o")
    tensors, metadata = _read(model)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("model_ema.")}
    names = {name: original for name, original in original_names(tensors, config).items() if name in update.names}
    update.require({name: tensors[original] for name, original in names.items()})
    changed = {original: update.added(name, tensors[original]) for name, original in names.items()}
    metadata = {**metadata, NOTE: _with_note(metadata.get(NOTE, "[]"), note)}
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        save_file({**tensors, **changed}, Path(folder) / out.name, metadata)
        return (Path(folder) / out.name).replace(out)


def _with_note(notes: str, note: dict[str, Any]) -> str:
    """The notes of what was fused so far, and this one; raises `SafepatchError` when it is among them."""
    earlier = json.loads(notes)
    if any(each.get("weights", each["hash"]) in (note["weights"], note["hash"]) for each in earlier):
        raise SafepatchError(f"'{note['title']}' was fused into this model already; fuse it into the original")
    return json.dumps([*earlier, note], sort_keys=True)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if path.suffix != ".safetensors":
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        tensors = tensors.get("state_dict", tensors)
        kept = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
        return {name: tensor.clone().contiguous() for name, tensor in kept.items()}, {"format": "pt"}
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in list(file.keys())}, file.metadata() or {"format": "pt"}

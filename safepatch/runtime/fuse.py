"""Write a lora patch into a model's weights, for hosts that run no safepatch: the result is a plain checkpoint.

What is fused acts in every row of every call, whatever a gate would say, and cannot be taken off, scaled or checked by
fail-closed. In particular a negative prompt that names the unsafe concept is answered by the patched model too, where
`apply` leaves it alone.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.diffusion import Components
from safepatch.errors import ModelNotFound, SafepatchError
from safepatch.files import replacing_folder, unwritable
from safepatch.models.load import MODELS
from safepatch.models.weights import NAMES, Stored
from safepatch.patch.files import check_fits
from safepatch.runtime.check import require_fit
from safepatch.runtime.fused_files import NOTE, Job, Tell, fuse_embedded, fuse_file, fuse_folder
from safepatch.runtime.handle import refuse_fused_projections
from safepatch.runtime.update import Update

__all__ = ["NOTE", "Update", "fuse", "fuse_model"]


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
    update.require({name: _stored(weight) for name, weight in weights.items()})
    for name in update.names:
        weights[name].copy_(update.added(name, weights[name]))


def _stored(weight: Tensor) -> Stored:
    dtype = "nothing, offloaded layer by layer," if weight.is_meta else NAMES.get(weight.dtype, str(weight.dtype))
    return Stored(dtype, tuple(weight.shape), 0, weight.nbytes)


def fuse_model(
    model: str | Path,
    patch: str | Path,
    out: str | Path,
    scale: float = 1.0,
    allow_pickle: bool = False,
    tell: Tell = lambda line: None,
) -> Path:
    """A copy of a model with a lora patch in its weights; everything else in it stays byte for byte.

    In a folder, whatever may hold weights and is none of the pipeline's other components is fused or, where it cannot
    be, left out of the copy: it would be unpatched. So is a single file's second, averaged UNet (`model_ema`).

    Args:
        model: an embedded model, a diffusers folder, or a single file in the original layout.
        patch: path of the patch.
        out: where the copy goes, all or nothing: a new folder, or for a single file a `.safetensors` file.
        scale: strength, 0 or more.
        allow_pickle: read `.ckpt` and `.bin` files too, with torch's restricted loader.
        tell: is told in a line each what was fused, and what was left out and why.

    Raises:
        ConfigError: as `fuse`.
        BaseMismatch: when the patch was made for another architecture.
        ModelNotFound: when there is no such model here; a Hub id has to be downloaded first.
        UnsupportedModel: when the model is damaged.
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
    job = Job(update, config, note, allow_pickle, tell)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if model.is_file():
            fuse_file(model, out, job)
        elif out.exists() or model.resolve() in out.resolve().parents:
            raise SafepatchError(f"{out} exists already, or is inside {model}; give a new folder")
        else:
            with replacing_folder(out) as folder:
                (fuse_embedded if str(model) in MODELS else fuse_folder)(model, folder, job)
    except (OSError, SafetensorError) as error:  # the latter from diffusers' own saving
        raise unwritable(out, error, "choose another -o") from error
    return out

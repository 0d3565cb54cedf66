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
from safepatch.diffusion import UNET, Components, is_offloaded_to_disk
from safepatch.errors import ConfigError, ModelNotFound, SafepatchError
from safepatch.files import replacing_folder, unwritable
from safepatch.models.load import MODELS
from safepatch.models.weights import NAMES, Stored
from safepatch.patch.files import check_fits, require_encoder
from safepatch.runtime.check import require_fit
from safepatch.runtime.fused_files import NOTE, Job, Tell, fuse_embedded, fuse_file, fuse_folder, plain_name
from safepatch.runtime.refusals import refuse_fused_projections
from safepatch.runtime.update import Update

__all__ = ["NOTE", "Update", "fuse", "fuse_model"]


@torch.no_grad()
def fuse(pipe: Any, patch: str | Path | PatchArtifact, scale: float = 1.0) -> None:
    """Add a lora patch to the weights of a pipeline's denoiser, or text encoder, for good.

    A text encoder then reads negative prompts as the patched one too, and safepatch's gates judge by what it reads.

    Args:
        pipe: a diffusers pipeline; its weights keep their dtype.
        patch: path of an artifact, or an opened one; a bundle of lora patches counts as their sum.
        scale: strength, 0 or more.

    Raises:
        ConfigError: for a patch of another kind, a scale below 0, or weights that cannot be written; none is then.
        BaseMismatch: when the patch was made for another architecture.
    """
    artifact = patch if isinstance(patch, PatchArtifact) else PatchArtifact.open(patch)
    components = Components.of(pipe)
    check_fits(artifact.info, components.unet.config)
    refuse_fused_projections(components.unet)
    update = Update.of(artifact, scale)
    places = [(update.of_component(name), _weights(components, name)) for name in update.components]
    for part in artifact.parts():
        if part.artifact.info.component != UNET.component:
            require_encoder(part.artifact.info, components.encoder(part.artifact.info.component)[1])
    for own, weights in places:  # before anything is written
        own.require({name: _stored(weight) for name, weight in weights.items()})
    for own, weights in places:
        for name in own.names:
            weights[name].copy_(own.added(name, weights[name]))


def _weights(components: Components, component: str) -> dict[str, Tensor]:
    """By name, as a patch calls them."""
    module = components.unet if component == UNET.component else components.encoder(component)[1]
    if is_offloaded_to_disk(module):
        raise ConfigError(
            f"the weights of the {type(module).__name__} are offloaded to disk group by group, what is there are "
            "placeholders; fuse before offloading"
        )
    named = {name.replace(".base_layer", ""): weight for name, weight in module.named_parameters()}
    return {plain_name(name, component): weight for name, weight in named.items()}


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
    if changed := [name for name in update.components if name != UNET.component]:
        tell(f"{', '.join(changed)}: reads negative prompts as the patched one too, and so do gates of other patches")
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

"""From a trained patch to its file and back onto any host of the same architecture."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from safepatch.artifact.info import PatchInfo
from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.diffusion import family, fingerprint
from safepatch.errors import ArtifactError, BaseMismatch, lookup
from safepatch.patch import PATCH_KINDS, LoraPatch, Patch
from safepatch.patch.drift import ENCODER, sketch

# A file need not have copies of the host's weights, a layer that is left alone, and what older lite patches lack.
MAY_LACK = re.compile(r"control\.clone\.|lora\.(?!gate\.)|lite\..*\.told$")


def to_artifact(
    patch: Patch,
    unet: Any,
    instructions: dict[str, str],
    config: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    license: str = "",
) -> PatchArtifact:
    """The patch as deltas against `unet`, float32.

    Args:
        patch: what to store.
        unet: the host it was trained on.
        instructions: safety instruction by category.
        config: the resolved training configuration.
        training: record of the training (steps, seeds, versions); no clock, so that equal runs give equal files.
        license: SPDX expression; whose patch it is decides.
    """
    tensors, shapes = patch.stored(unet)
    info = PatchInfo(
        kind=patch.kind,
        instructions=dict(sorted(instructions.items())),
        fingerprint=fingerprint(unet.config),
        base={"family": family(unet.config), ENCODER: sketch(unet)},
        config={**(config or {}), "sees": patch.sees, **({"layout": patch.layout} if patch.layout else {})},
        training=training or {},
        shapes=shapes,
        title=f"safepatch {' + '.join(sorted(instructions))}",
        license=license,
    )
    return PatchArtifact(tensors, info)


def from_artifact(artifact: PatchArtifact, unet: Any, dtype: torch.dtype = torch.float32) -> Patch:
    """A patch module on `unet`: the host's own weights plus the stored deltas (rebasing), summed in float32.

    Args:
        artifact: the patch.
        unet: the host, which is only read.
        dtype: of the module's parameters.

    Raises:
        BaseMismatch: when the file is for another architecture.
        ArtifactError: when parameters are missing that are no copies of the host's.
    """
    check_fits(artifact.info, unet.config)
    if artifact.info.is_bundle:
        raise BaseMismatch("a bundle is several patches, not one module; apply it, or take one of its parts()")
    kind, config = lookup(PATCH_KINDS, artifact.info.kind, what="patch kind"), artifact.info.config
    patch = kind.from_unet(unet, config["sees"], empty=True, **config.get("layout", {}))
    _require_parameters(patch, artifact)
    patch.load(unet, artifact, dtype)
    return patch.eval().requires_grad_(False)


def _require_parameters(patch: Patch, artifact: PatchArtifact) -> None:
    """Raise unless the file has what is the patch's own, and everything in the shape it has on this host."""
    for name, wanted in _shapes(patch).items():
        shape = artifact.shape(name)
        if shape is None and not MAY_LACK.match(name):
            raise ArtifactError(f"'{artifact.info.title}' lacks '{name}'; train or fetch it again")
        if shape not in (None, wanted):
            raise BaseMismatch(
                f"'{name}' is {list(shape or ())} in this patch and {list(wanted)} on this model; "
                "use it on a model of its own family"
            )


def _shapes(patch: Patch) -> dict[str, tuple[int, ...]]:
    """The full shape of every parameter, by its name in files."""
    named = {name.replace(".base_layer.", "."): p for name, p in patch.named_parameters()}  # PEFT wraps layers
    if not isinstance(patch, LoraPatch):
        return {f"{patch.kind}.{name}": tuple(parameter.shape) for name, parameter in named.items()}
    return {
        f"lora.{layer}.weight": (*named[f"updates.{i}.up"].shape[:1], *named[f"updates.{i}.down"].shape[1:])
        for i, layer in enumerate(patch.layers)
    } | {f"lora.{name}": tuple(parameter.shape) for name, parameter in named.items() if name.startswith("gate.")}


def check_fits(info: PatchInfo, config: Mapping[str, Any]) -> None:
    """Raise a one-line `BaseMismatch` unless the patch was made for UNets of this configuration."""
    ours, theirs = fingerprint(config), info.fingerprint
    wrong = [key for key in (*ours, *theirs) if ours.get(key) != theirs.get(key)]
    if not wrong:
        return
    key, kind = wrong[0], "UNets" if "cross_attention_dim" in theirs else "transformers"
    patched, model = info.base.get("family", "other"), family(config)
    made_for, found, advice = f"{patched} {kind}", model, f"train or fetch the {model} version of it"
    if key in theirs or patched == model:  # else the families' names say it
        made_for, found = f"{made_for} ({key} {theirs.get(key)})", f"{model} ({key} {ours.get(key)})"
    if patched == model:
        advice = "train one for this model"
    raise BaseMismatch(f"this patch is for {made_for}, the model is {found}; {advice}")


def absolute(artifact: PatchArtifact, base_unet: Any, host_unet: Any) -> PatchArtifact:
    """The same patch with its clone's weights as they were on `base_unet`, expressed as deltas against `host_unet`."""
    tensors, shapes = from_artifact(artifact, base_unet).stored(host_unet)
    return replace(artifact, tensors=tensors, info=replace(artifact.info, shapes=shapes))

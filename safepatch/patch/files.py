"""From a trained patch to its file and back onto any host of the same architecture."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from safepatch.artifact.info import PatchInfo
from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.diffusion import family, fingerprint
from safepatch.errors import BaseMismatch, lookup
from safepatch.patch import PATCH_KINDS, Patch
from safepatch.patch.drift import ENCODER, sketch


def to_artifact(
    patch: Patch,
    unet: Any,
    instructions: dict[str, str],
    config: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
) -> PatchArtifact:
    """The patch as deltas against `unet`, float32.

    Args:
        patch: what to store.
        unet: the host it was trained on.
        instructions: safety instruction by category.
        config: the resolved training configuration.
        training: record of the training (steps, seeds, versions); no clock, so that equal runs give equal files.
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
        license="apache-2.0",
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
    """
    check_fits(artifact.info, unet.config)
    if artifact.info.is_bundle:
        raise BaseMismatch("a bundle is several patches, not one module; apply it, or take one of its parts()")
    kind, config = lookup(PATCH_KINDS, artifact.info.kind, what="patch kind"), artifact.info.config
    patch = kind.from_unet(unet, config["sees"], empty=True, **config.get("layout", {}))
    patch.load(unet, artifact, dtype)
    return patch.eval().requires_grad_(False)


def check_fits(info: PatchInfo, config: Mapping[str, Any]) -> None:
    """Raise a one-line `BaseMismatch` unless the patch was made for UNets of this configuration."""
    ours, theirs = fingerprint(config), info.fingerprint
    wrong = [key for key in ours if ours[key] != theirs.get(key)]
    if wrong:
        key, kind = wrong[0], "UNets" if "cross_attention_dim" in theirs else "transformers"
        made_for, model = f"{info.base.get('family', 'other')} {kind}", family(config)
        if key in theirs:  # else the families' names say it
            made_for, model = f"{made_for} ({key} {theirs[key]})", f"{model} ({key} {ours[key]})"
        raise BaseMismatch(
            f"this patch is for {made_for}, the model is {model}; train or fetch the {family(config)} version of it"
        )


def absolute(artifact: PatchArtifact, base_unet: Any, host_unet: Any) -> PatchArtifact:
    """The same patch with its clone's weights as they were on `base_unet`, expressed as deltas against `host_unet`."""
    tensors, shapes = from_artifact(artifact, base_unet).stored(host_unet)
    return replace(artifact, tensors=tensors, info=replace(artifact.info, shapes=shapes))

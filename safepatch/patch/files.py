"""From a trained patch to its file and back onto any host of the same architecture."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from safepatch.artifact.info import PatchInfo
from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.diffusion import UNET, Components, family, fingerprint
from safepatch.errors import ArtifactError, BaseMismatch, ConfigError, lookup
from safepatch.patch import PATCH_KINDS, LoraPatch, Patch
from safepatch.patch.drift import ENCODER, plain_parameters, sketch, text_sketch
from safepatch.patch.text import TextPatch, encoder_fingerprint

# A file need not have copies of the host's weights, a layer that is left alone, and what older lite patches lack.
MAY_LACK = re.compile(r"control\.clone\.|lora\.(?!gate\.)|lite\..*\.told$")


def to_artifact(
    patch: Patch,
    host: Any,
    instructions: dict[str, str],
    config: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    license: str = "",
) -> PatchArtifact:
    """The patch as deltas against its host, float32.

    Args:
        patch: what to store.
        host: the UNet it was trained on, or all components of that model, which a text encoder's patch needs.
        instructions: safety instruction by category.
        config: the resolved training configuration.
        training: record of the training (steps, seeds, versions); no clock, so that equal runs give equal files.
        license: SPDX expression; whose patch it is decides.
    """
    unet, changed, told = _unet(host), _changed(host, patch.component), {}
    if isinstance(patch, TextPatch):
        told = {"component": patch.component, "encoder": encoder_fingerprint(changed)}
    own = plain_parameters(changed)
    sums = text_sketch(own, own.__getitem__) if told else sketch(unet)
    tensors, shapes = patch.stored(unet)
    info = PatchInfo(
        kind=patch.kind,
        instructions=dict(sorted(instructions.items())),
        fingerprint=fingerprint(unet.config),
        base={"family": family(unet.config), ENCODER: sums},
        config={**(config or {}), **told, "sees": patch.sees, **({"layout": patch.layout} if patch.layout else {})},
        training=training or {},
        shapes=shapes,
        title=f"safepatch {' + '.join(sorted(instructions))}{f' ({patch.component})' if told else ''}",
        license=license,
    )
    return PatchArtifact(tensors, info)


def from_artifact(artifact: PatchArtifact, host: Any, dtype: torch.dtype = torch.float32) -> Patch:
    """A patch module on its host: the host's own weights plus the stored deltas (rebasing), summed in float32.

    Args:
        artifact: the patch.
        host: the UNet, or all components, which a text encoder's patch needs; they are only read.
        dtype: of the module's parameters.

    Raises:
        BaseMismatch: when the file is for another architecture.
        ArtifactError: when parameters are missing that are no copies of the host's.
    """
    unet = _unet(host)
    check_fits(artifact.info, unet.config)
    if artifact.info.is_bundle:
        raise BaseMismatch("a bundle is several patches, not one module; apply it, or take one of its parts()")
    kind, config = lookup(PATCH_KINDS, artifact.info.kind, what="patch kind"), artifact.info.config
    changed, layout = _changed(host, artifact.info.component), config.get("layout", {})
    if changed is not unet:
        require_encoder(artifact.info, changed)
        patch = TextPatch.of(host, artifact.info.component, **layout)
    else:
        patch = kind.from_unet(unet, config["sees"], empty=True, **layout)
    _require_parameters(patch, artifact)
    patch.load(changed, artifact, dtype)
    return patch.eval().requires_grad_(False)


def _unet(host: Any) -> Any:
    return host.unet if isinstance(host, Components) else host


def _changed(host: Any, component: str) -> Any:
    """What of a host a patch for `component` changes."""
    if component == UNET.component:
        return _unet(host)
    if not isinstance(host, Components):
        raise ConfigError(f"not supported here: a patch of the {component}; use apply on a pipeline")
    return host.encoder(component)[1]


def require_encoder(info: PatchInfo, encoder: Any) -> None:
    """Raise a one-line `BaseMismatch` unless a patch was made for text encoders of this shape."""
    ours, theirs = encoder_fingerprint(encoder), info.config.get("encoder", {})
    if wrong := [key for key in ours if ours[key] != theirs.get(key)]:
        key = wrong[0]
        raise BaseMismatch(
            f"this patch is for a {info.component} of {key} {theirs.get(key)}, the model's has {ours[key]}; "
            "train one for this model"
        )


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

"""Attach a patch to somebody's pipeline; the `Handle` takes it off again, bit for bit."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safepatch.artifact.patch_artifact import Part, PatchArtifact
from safepatch.diffusion import Components, encode_prompts
from safepatch.errors import ConfigError
from safepatch.hub import located, source_of
from safepatch.patch import Patch
from safepatch.patch.files import from_artifact
from safepatch.patch.picture import TEXT
from safepatch.patch.text import TextPatch, require_readable
from safepatch.runtime.handle import Handle
from safepatch.runtime.one_step import require_scheduler, step_of
from safepatch.runtime.parts import ActivePart, Scale, told_apart
from safepatch.runtime.refusals import refuse_absent_weights, refuse_compiled, refuse_fused_projections
from safepatch.signing import held_copy, require_trusted


def apply(
    pipe: Any,
    patch: str | Path | PatchArtifact,
    scale: Scale = 1.0,
    fail_closed: bool = True,
    start: float = 0.0,
    end: float = 1.0,
    gate: str | None = None,
    gate_threshold: float | None = None,
    speed: str = "full",
    reads: str = "windows",
    trusted: str | Path | Sequence[str | Path] | None = None,
) -> Handle:
    """Attach a patch to a diffusers pipeline.

    Args:
        pipe: any pipeline with a UNet, a VAE and a text encoder; it is not changed but for hooks.
        patch: path of an artifact, or an opened one; or one on the Hub, `user/repo[@revision][#content hash]`.
        scale: run-time strength, one for all or by category (1 for those not named); 0 is off.
        fail_closed: raise `PatchBypassed` instead of returning an image that was made without the patch.
        start: share of the denoising after which the patch begins to act, 0 for pure noise.
        end: share of the denoising after which it stops.
        gate: `hard` (the default of a patch with a gate), `soft` or `off`; see `Handle.gate`.
        gate_threshold: probability in [0, 1] above which the gate opens; by default as stored in the file.
        speed: `full`, or `fast`: a control patch runs at every second step; see `Handle.speed`.
        reads: `windows`: a gate that was fitted for them opens for any few words that tell, whatever stands around
            them; or `prompt`: the whole prompt decides, which takes more harmless mentions for harmless, and which
            other words can close; see `Handle.reads`.
        trusted: public keys or root certificates, one of which must have signed the file; or `first-use`, to trust the
            key that comes with it the first time and no other one later; see `signing`. None asks for no signature.

    Returns:
        The handle; use it in `with`, or call its `remove()`.

    Raises:
        BaseMismatch: when the patch was made for another architecture.
        ArtifactError: when the file is missing, damaged, altered, or has another content hash than the pinned one.
        NotTrusted: when `trusted` is given, and the file is not signed, signed by another, or was altered since.
        ModelNotFound: when the Hub has no such patch, or it is offline and not in the cache.
        ConfigError: when scale, start or end is out of range, a scale is for a category the patch cannot tell apart, or
            the UNet was compiled, offloaded layer by layer, or given fused attention projections before.
        UnknownName: for a speed, a way of reading, or a scale's category, that there is not.
    """
    components = Components.of(pipe)
    refuse_compiled(pipe)
    refuse_absent_weights(components.unet)
    refuse_fused_projections(components.unet)
    artifact = patch if isinstance(patch, PatchArtifact) else _opened(patch, trusted)
    if trusted is not None and artifact is patch:
        raise ConfigError("an opened patch has no signature; give apply(..., trusted=...) the path of its file")
    parts = told_apart([activate(part, components, gate_threshold) for part in artifact.parts()])
    if gate_threshold is not None and not any(part.patch.gate for part in parts):
        raise ConfigError("this patch has no gate; fit one with `safepatch gate`, or leave gate_threshold out")
    steps = [timestep for part in artifact.parts() if (timestep := step_of(part.artifact.info)) is not None]
    if steps:
        require_scheduler(pipe, steps[0])
    handle = Handle(pipe, parts, scale, fail_closed, (start, end), gate, speed, reads)
    handle.only_step = steps[0] if steps else None
    handle.content_hash = artifact.opened_hash
    return handle


def _opened(patch: str | Path, trusted: str | Path | Sequence[str | Path] | None) -> PatchArtifact:
    """The patch that somebody named, of whoever is trusted."""
    path = located(patch, signed=trusted is not None)
    if trusted is None or not path.is_file():
        return PatchArtifact.open(path)
    with held_copy(path) as held:
        require_trusted(held, trusted, source_of(patch))
        return PatchArtifact.open(held)


def attach(pipe: Any, patch: Patch, instructions: list[str], scale: float = 1.0, fail_closed: bool = True) -> Handle:
    """Attach a patch module that is already in memory, reading `instructions`; its gate, if any, opens at 0.5."""
    thresholds = torch.full((patch.groups,), 0.5) if patch.gate else None
    part = ActivePart(patch, instruction_states(Components.of(pipe), instructions), thresholds=thresholds)
    return Handle(pipe, [part], scale, fail_closed)


def activate(
    part: Part, components: Components, gate_threshold: float | None = None, dtype: torch.dtype | None = None
) -> ActivePart:
    """A part on the components' UNet, reading its own instructions only.

    Args:
        part: the patch and its weight.
        components: of the host.
        gate_threshold: as in `apply`.
        dtype: of the module; the host's by default.

    Raises:
        BaseMismatch: when the patch was made for another architecture.
        ConfigError: for a threshold that is no probability, or a text encoder that its patch could not read.
    """
    if gate_threshold is not None and not 0 <= gate_threshold <= 1:
        raise ConfigError(f"gate_threshold must be within [0, 1], not {gate_threshold}")
    module = from_artifact(part.artifact, components, dtype or components.compute_dtype)
    if isinstance(module, TextPatch):
        require_readable(components.encoder(module.component)[1])
    module = module.to(components.unet.device)
    states = instruction_states(components, list(part.artifact.info.instructions.values()))
    return ready(part, module, states, gate_threshold)


def ready(part: Part, module: Patch, states: Tensor, gate_threshold: float | None = None) -> ActivePart:
    """A part's module with what its file says of it.

    Args:
        part: the patch and its weight.
        module: made of it.
        states: text states of its instructions, (1, tokens, width).
        gate_threshold: as in `apply`.
    """
    info = part.artifact.info
    if module.gate is None:
        return ActivePart(module, states, part.weight, info.categories)
    records = [info.config["gate"][name] for name in info.categories]
    stored = [record["threshold"] for record in records]
    thresholds = torch.tensor([value if gate_threshold is None else gate_threshold for value in stored])
    windows = tuple(record.get("windows", 0) for record in records)
    active = ActivePart(module, states, part.weight, info.categories, thresholds, windows)
    keys = tuple(record.get("keys", TEXT) for record in records)
    if module.gate.picture is None or set(keys) == {TEXT}:
        return active
    odds = torch.tensor([record.get("picture", {}).get("threshold", 1.0) for record in records], dtype=torch.float64)
    return active._replace(keys=keys, evidence=odds.logit().float())


def instruction_states(components: Components, instructions: list[str]) -> Tensor:
    """The instructions' text states side by side, shape (1, tokens, width)."""
    states = encode_prompts(components, instructions)
    return states.reshape(1, -1, states.shape[-1])

"""Whether a patch fits a model, told before any weight is read; and what is attached to a pipeline."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from safepatch.artifact.info import PatchInfo, read_info
from safepatch.diffusion import UNET, Components, empty_unet, family, fingerprint, host_kind, uncompiled
from safepatch.errors import UnsupportedModel
from safepatch.models.load import flow_file, load_unet, text_encoder_weights, unet_config, unet_files
from safepatch.models.weights import denoiser_weights
from safepatch.patch.drift import ENCODER, drift, sketch, text_sketch
from safepatch.patch.files import check_fits
from safepatch.runtime.handle import Handle, attached
from safepatch.runtime.parts import Scale
from safepatch.runtime.stats import Stats


@dataclass(frozen=True)
class Fit:
    """A patch that fits a model.

    Attributes:
        family: of the model, e.g. `sd1`.
        fingerprint: the architecture that both have.
        info: what the patch is.
        drifts: by component that it changes, |host - base| / |base| over the weights of the UNet's encoder, or of the
            text encoder; where the patch records its base, and the model's files can be read for it.
    """

    family: str
    fingerprint: dict[str, Any]
    info: PatchInfo
    drifts: dict[str, float]

    @property
    def drift(self) -> float | None:
        """Of the first component that it changes; None where that is unknown."""
        return self.drifts.get(self.info.components[0])


def check(model: str | Path, patch: str | Path, allow_pickle: bool = False) -> Fit:
    """Say whether `patch` fits `model`, and how far the model is from the one the patch was trained on.

    That it fits is told from headers and configurations; weights are read only then, to measure the drift.

    Raises:
        BaseMismatch: when the patch is for another architecture.
        ModelNotFound: when there is no such model.
        UnsupportedModel: when the model is of another kind.
        ArtifactError: when the file is no patch.
    """
    info, config = require_fit(model, patch, allow_pickle)
    found = {}
    for component, base in _bases(info).items():
        if (own := _sketch_of(model, component, config, allow_pickle)) is not None:
            found[component] = drift(own, base)
    return Fit(family(config), fingerprint(config), info, found)


def _bases(info: PatchInfo) -> dict[str, str]:
    """By component, the sketch of what its patches were trained on, where all have the same."""
    known: dict[str, set[str]] = {}
    for each in info.singles():
        known.setdefault(each.component, set()).add(each.base.get(ENCODER, ""))
    return {component: next(iter(some)) for component, some in known.items() if len(some) == 1 and "" not in some}


def _sketch_of(model: str | Path, component: str, config: Mapping[str, Any], allow_pickle: bool) -> str | None:
    if component == UNET.component:
        return _sketch(model, config, allow_pickle)
    found = text_encoder_weights(model, component, allow_pickle)
    return None if found is None else text_sketch(*found)


def _sketch(model: str | Path, config: Mapping[str, Any], allow_pickle: bool) -> str:
    """Of the model's encoder, of which two weights at a time are in memory where they are in files."""
    if flow := flow_file(model, allow_pickle):
        return sketch(empty_unet(config), flow.read)
    files = unet_files(model, allow_pickle)
    if files is None:
        return sketch(load_unet(str(model)))
    places = denoiser_weights(files, config)

    def read(name: str) -> Tensor:
        if name not in places:
            raise UnsupportedModel(f"{model} lacks '{name}' of what denoises; fetch it again")
        file, stored = places[name]
        return file.read(stored)

    return sketch(empty_unet(config), read)


def require_fit(
    model: str | Path, patch: str | Path, allow_pickle: bool = False
) -> tuple[PatchInfo, Mapping[str, Any]]:
    """The patch's description and the model's UNet configuration; raises as `check` and reads no weights."""
    info, config = read_info(patch), unet_config(model, allow_pickle)
    check_fits(info, config)
    return info, config


@dataclass(frozen=True)
class Status:
    """One patch on a pipeline.

    Attributes:
        categories: what it is for; empty when it was attached from memory.
        active: whether the next image of the pipeline that was asked about will be drawn with it: every hook it needs
            hangs where it must.
        scale: its strength; at 0 it is attached and does nothing.
        weights: what each category's corrections are multiplied by beside the scale, as the patch was merged.
        stats: UNet calls seen, patched and acted on since it was attached.
        handle: with which to change the scale or to take it off.
    """

    categories: tuple[str, ...]
    active: bool
    scale: Scale
    weights: Mapping[str, float]
    stats: Stats
    handle: Handle


def status(pipe: Any) -> tuple[Status, ...]:
    """What is attached to a pipeline, in the order it was attached; a patch that lost its hook shows as not active.

    Raises:
        UnsupportedModel: when the pipeline is of a kind that patches do not know.
    """
    components = Components.of(pipe)
    entry = getattr(components.unet, host_kind(components.unet).entry)
    places = (components.unet, entry, uncompiled(components.vae).decoder)
    handles = {id(handle): handle for place in places for handle in attached(place)}
    return tuple(
        Status(handle.categories, handle.acts_in(pipe), handle.scale, handle.weights, handle.stats, handle)
        for handle in handles.values()
    )

"""A LoRA file as a patch: what `lora_out` wrote as it was; anybody else's as a patch without a gate."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safepatch.artifact.acting import is_zero, require_acting, require_finite
from safepatch.artifact.container import VERSION_KEY, naming
from safepatch.artifact.info import EXPORTED, PatchInfo
from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.diffusion import UNET, config_kind, empty_text_encoder, empty_unet, family, fingerprint
from safepatch.errors import ConfigError, SafepatchError, UnsupportedModel
from safepatch.export.factors import PAIRS, Read, Side, read_factors
from safepatch.export.lora_back import DAMAGES, exported
from safepatch.export.names import DIFFUSERS_FILE, GUARD, TEXT_ENCODERS, layers_by_name, text_layers_by_name
from safepatch.merging import combine
from safepatch.merging.recipe import MergeRecipe
from safepatch.models.checkpoint import CONFIGS
from safepatch.models.load import text_encoder_configs, unet_config
from safepatch.models.weights import Weights, open_weights
from safepatch.patch import LoraPatch
from safepatch.patch.layers import taken_layers
from safepatch.patch.text import TextPatch, encoder_fingerprint
from safepatch.taxonomy import Category


def import_lora(
    path: str | Path,
    category: Category | None = None,
    model: str | Path | None = None,
    partly: bool = False,
    license: str = "",
) -> PatchArtifact:
    """A LoRA file as a patch.

    What `export` wrote comes back as it was, with its gate. Anybody else's becomes a patch without a gate: fit one with
    `safepatch gate`, merge it, attack it. One that changes text encoders beside what denoises becomes a bundle, of a
    patch for each.

    Args:
        path: a kohya or diffusers LoRA, or the folder of one.
        category: what somebody else's is for; not needed where `export` wrote the file.
        model: what it is for; by default its family, told by the width of its text states.
        partly: leave out what a patch has no place for: what is neither in the blocks of a UNet or a transformer, nor
            in those of a text encoder that is known.
        license: of somebody else's; by default what the file states.

    Raises:
        ArtifactError: for an export that was altered since, and for weights that are not finite, or change nothing.
        UnsupportedModel: for another kind of file, and for what would be left out.
        BaseMismatch: when it does not fit the model.
        ConfigError: when there is no category, no such file, or it is a patch.
    """
    path = Path(path)
    if not path.exists():
        raise ConfigError(f"no LoRA at {path}; check the path")
    weights = open_weights(path / DIFFUSERS_FILE if path.is_dir() else path)
    if EXPORTED in weights.metadata and category is None:
        made = exported(weights)
    else:
        made = _somebody_elses(weights, path, category, model, partly, license)
    with naming(weights.path):
        require_finite(made)
        require_acting(made)
    return made


def _somebody_elses(
    weights: Weights, path: Path, category: Category | None, model: str | Path | None, partly: bool, license: str
) -> PatchArtifact:
    if VERSION_KEY in weights.metadata:
        raise ConfigError(f"{path} is a patch already; use it as it is")
    if category is None:
        raise ConfigError(f"{path} does not say what it is for; name a category: --category FILE.yaml")
    config = _config_for(weights, model)
    about = PatchInfo(
        kind=LoraPatch.kind,
        instructions={category.name: category.instruction},
        fingerprint=fingerprint(config),
        base={"family": family(config)},
        config={"sees": "prompt", "imported": path.name},
        title=f"{path.stem} (imported)",
        license=license or weights.metadata.get("modelspec.license", ""),
    )
    try:
        parts = _parts(weights, config, model, partly, about)
    except SafepatchError:
        raise
    except DAMAGES as error:
        raise UnsupportedModel(f"{weights.path} is damaged ({error}); fetch it again") from error
    if len(parts) == 1:
        return parts[0]
    made = combine(parts, MergeRecipe(tuple(part.info.title for part in parts), conflicts=False))
    return replace(made, info=replace(made.info, title=about.title))


def _parts(
    weights: Weights, config: Mapping[str, Any], model: str | Path | None, partly: bool, about: PatchInfo
) -> list[PatchArtifact]:
    """A patch for each side of the pipeline that somebody else's LoRA changes."""
    parts, left = [], {*weights.tensors} - {GUARD}
    for side, told in _sides(weights, config, model):
        read = read_factors(weights, side)
        left -= read.used
        if read.ranks:
            parts.append(_part(read, side, told, about))
    if left and not partly:
        what = "a text encoder's layers" if any(n.startswith(TEXT_ENCODERS) for n in left) else "layers"
        raise UnsupportedModel(
            f"{weights.path} has {what} that a lora patch has no place for ({len(left)} tensors, '{min(left)}'); "
            "--partly leaves them out"
        )
    if not parts:
        raise UnsupportedModel(f"{weights.path} has no LoRA of a layer that this model has; name another --model")
    acting = [part for part in parts if not all(is_zero(part, name) for name in part.parameter_names())]
    return acting or parts  # some programs write zeros for a side that they did not train


def _sides(
    weights: Weights, config: Mapping[str, Any], model: str | Path | None
) -> Iterator[tuple[Side, dict[str, Any]]]:
    """What a LoRA may change, each with what a patch's configuration says of it."""
    layers = taken_layers(empty_unet(config))
    yield Side(config_kind(config).component, layers, layers_by_name(layers, config)), {}
    if config_kind(config) is not UNET or not any(name.startswith(TEXT_ENCODERS) for name in weights.tensors):
        return
    for component, each in _text_configs(config, model).items():
        encoder = empty_text_encoder(each)
        own = TextPatch.taken_layers(encoder)
        told = {"component": component, "encoder": encoder_fingerprint(encoder)}
        yield Side(component, own, text_layers_by_name(own, component, config)), told


def _part(read: Read, side: Side, told: Mapping[str, Any], about: PatchInfo) -> PatchArtifact:
    config = {**about.config, **told, "layout": {"rank": max(read.ranks.values())}}
    shapes = {f"lora.{layer}.weight": list(side.shapes[layer]) for layer in read.ranks}
    title = f"{about.title}, {side.component}" if told else about.title
    return PatchArtifact(read.tensors, replace(about, config=config, shapes=shapes, title=title))


def _config_for(weights: Weights, model: str | Path | None) -> Mapping[str, Any]:
    """The UNet that a LoRA is for."""
    if model is not None:
        return unet_config(model)
    widths = {
        stored.shape[1]
        for name, stored in weights.tensors.items()
        if "attn2" in name and ("to_k" in name or "to_v" in name) and name.endswith(tuple(down for down, _ in PAIRS))
    }
    names = {family({"cross_attention_dim": width}) for width in widths}
    name = names.pop() if len(names) == 1 else "unknown"
    if not (CONFIGS / f"{name}.json").is_file():
        raise UnsupportedModel(f"{weights.path} does not tell its family; name a model that it is for: --model")
    return _family_config(name)["unet"]


def _text_configs(config: Mapping[str, Any], model: str | Path | None) -> dict[str, dict[str, Any]]:
    """By component, those of the model's text encoders; of its family's where the model is not here."""
    found = {} if model is None else text_encoder_configs(model)
    if found or not (CONFIGS / f"{family(config)}.json").is_file():
        return found
    usual = _family_config(family(config))
    return {name: usual[name] for name in ("text_encoder", "text_encoder_2") if name in usual}


def _family_config(name: str) -> dict[str, dict[str, Any]]:
    return json.loads((CONFIGS / f"{name}.json").read_text("utf-8"))

"""What a patch is, without its tensors, and how a file's metadata says it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safepatch.artifact.container import (
    GUARD_KEY,
    HASH_KEY,
    NO_HASH,
    VERSION_KEY,
    canonical_json,
    naming,
    read_header,
)
from safepatch.artifact.schema import SCHEMA, plain
from safepatch.errors import ArtifactError

FORMAT_VERSION = 3
WITHOUT_LORA = 2  # is written where no part is a lora; from 3 on these are stored under names of their own
FITTING = -1  # the oldest version that holds a patch, chosen when the patch is made
BUNDLE = "bundle"  # the merge method that keeps its sources apart, as tensors `part<index>.<name>`
EXPORTED = "safepatch.exported"  # metadata of a LoRA that holds a patch
CONTROLNET = "safepatch.controlnet"  # metadata of a ControlNet: the patch that it was exported from
JSON_FIELDS = ("instructions", "fingerprint", "base", "config", "training", "recipe", "evaluation", "shapes")


@dataclass(frozen=True)
class PatchInfo:
    """What a patch is, without its tensors; what the schema does not allow cannot be constructed.

    JSON fields are copied and key-sorted on construction.

    Attributes:
        kind: how the patch acts on the model, e.g. `control`.
        instructions: category name -> the safety instruction its patch reads.
        fingerprint: architecture of the UNet the patch is for.
        base: {"family": ..., "hash": ...} of the model it was trained on.
        config: resolved training config, e.g. `sees`.
        training: record of the training; its `date`, if any, becomes `modelspec.date`.
        recipe: for a merged patch, the merge recipe with the hashes of its sources.
        evaluation: summary of measured rates.
        shapes: full shape of every parameter that is stored low-rank.
        title: shown to people; made from kind and categories when empty.
        license: SPDX expression, or empty when none was stated.
        format_version: of the file format; the oldest that holds it where none is given, and what was read from an
            older file is written as such, to the same bytes.
    """

    kind: str
    instructions: dict[str, str]
    fingerprint: dict[str, Any]
    base: dict[str, str]
    config: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] | None = None
    evaluation: dict[str, Any] = field(default_factory=dict)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    title: str = ""
    license: str = ""
    format_version: int = FITTING

    def __post_init__(self) -> None:
        """Normalize, so that equal content is equal bytes, and check."""
        if self.format_version == FITTING:
            is_lora = "lora" in str(self.kind).split("+")
            object.__setattr__(self, "format_version", FORMAT_VERSION if is_lora else WITHOUT_LORA)
        for name in JSON_FIELDS:
            object.__setattr__(self, name, _normal(name, getattr(self, name)))
        for name, check in SCHEMA.items():
            plain(getattr(self, name), name)
            check(getattr(self, name), name)
        object.__setattr__(self, "title", self.title or f"{self.kind} patch: {', '.join(self.categories)}")

    @property
    def categories(self) -> tuple[str, ...]:
        """Names of the harm categories the patch covers, sorted."""
        return tuple(self.instructions)

    @property
    def component(self) -> str:
        """What of a pipeline the patch changes, by diffusers' name; of a bundle, each part says so itself."""
        return self.config.get("component", "unet")

    @property
    def is_bundle(self) -> bool:
        """Whether the file keeps several patches apart, to be applied together."""
        return self.recipe is not None and self.recipe["method"] == BUNDLE

    @property
    def sources(self) -> list[dict[str, Any]]:
        """What the recipe of a merged patch says of its sources; empty for any other patch."""
        return (self.recipe or {}).get("sources", [])

    def singles(self) -> "list[PatchInfo]":
        """What a bundle keeps apart, as parts of bundles in it too; any other patch alone."""
        if not self.is_bundle:
            return [self]
        inner = [PatchInfo.from_metadata(source["metadata"]) for source in self.sources if "metadata" in source]
        return [each for info in inner for each in info.singles()] or [self]

    @property
    def components(self) -> tuple[str, ...]:
        """All that it changes, sorted."""
        return tuple(sorted({each.component for each in self.singles()}))

    def to_metadata(self) -> dict[str, str]:
        """The file's `__metadata__`: ModelSpec 1.0.1 and `safepatch.*` keys; the hash is a slot of zeros."""
        values = {
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": f"{self.base.get('family', 'unknown')}/{self.kind}",
            "modelspec.implementation": "safepatch",
            "modelspec.title": self.title,
            "modelspec.license": self.license,
            "modelspec.date": str(self.training.get("date", "")),
            HASH_KEY: NO_HASH,
            VERSION_KEY: str(self.format_version),
            "safepatch.kind": self.kind,
        }
        values |= {f"safepatch.{name}": canonical_json(getattr(self, name)) for name in JSON_FIELDS}
        return {key: value for key, value in sorted(values.items()) if value}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> "PatchInfo":
        """The inverse of `to_metadata`; raises `ArtifactError` for another program's or a newer file."""
        version = _format_version(metadata)
        try:
            fields = {name: json.loads(metadata[f"safepatch.{name}"]) for name in JSON_FIELDS}
            kind, title = metadata["safepatch.kind"], metadata["modelspec.title"]
        except (KeyError, ValueError, RecursionError) as error:
            raise ArtifactError(f"damaged: bad or missing metadata ({error}); fetch the file again") from error
        license_ = metadata.get("modelspec.license", "")
        return cls(kind=kind, title=title, license=license_, format_version=version, **fields)


def _normal(name: str, value: Any) -> Any:
    """The value as JSON gives it back: lists for tuples, keys sorted."""
    try:
        return json.loads(canonical_json(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(f"patch info '{name}' is not plain JSON ({error}); give numbers and texts") from error


def _format_version(metadata: Mapping[str, str]) -> int:
    version = metadata.get(VERSION_KEY)
    if version is None and EXPORTED in metadata:
        raise ArtifactError("is a patch that was exported as a LoRA; `safepatch import` makes it a patch again")
    if version is None and CONTROLNET in metadata:
        raise ArtifactError("is a ControlNet that was exported from a patch; give that patch")
    if version is None and GUARD_KEY in metadata:
        raise ArtifactError("is a guard of prompts, not a patch; give it as --guard")
    if version is None:
        raise ArtifactError("has no safepatch metadata: a safetensors file, but not a patch; choose a patch file")
    if version not in {str(known) for known in range(1, FORMAT_VERSION + 1)}:
        raise ArtifactError(f"has format {version}, this safepatch reads up to {FORMAT_VERSION}; upgrade safepatch")
    return int(version)


def read_info(path: str | Path) -> PatchInfo:
    """What a patch file is for, from its header alone; tensors and hash are not read."""
    with naming(Path(path)):
        return PatchInfo.from_metadata(read_header(Path(path)).metadata)

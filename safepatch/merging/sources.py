"""The patches that are merged: checked to belong together, in a fixed order, and read piece by piece.

A merge reads each source once, or twice, without verifying it first: its blocks are hashed as they are read, and held
against the hash that the file states before the merged file gets its name.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safepatch.artifact.acting import is_finite, require_acting
from safepatch.artifact.container import naming
from safepatch.artifact.info import PatchInfo
from safepatch.artifact.patch_artifact import Factors, PatchArtifact
from safepatch.artifact.tensor_file import TensorFile
from safepatch.errors import ArtifactError, BaseMismatch, MergeError, SafepatchError


@dataclass(frozen=True)
class Source:
    """One patch of a merge.

    Attributes:
        name: what errors call it, usually its path.
        artifact: its tensors, in a file or in memory, and its description.
        weight: its factor in the merge.
        hash: `0x` and 64 hex digits of its content, which a file only states until `confirm`.
    """

    name: str
    artifact: PatchArtifact
    weight: float
    hash: str

    @property
    def info(self) -> PatchInfo:
        """What the patch is."""
        return self.artifact.info

    def values(self, tensor: str, run: slice | None = None, room: memoryview | None = None) -> Tensor:
        """A tensor, or a run of its values, flat; what is read from a file, in `room`, bytes, if they suffice."""
        held = self.artifact.tensors
        if isinstance(held, TensorFile):
            return held.read(tensor, run, room)
        return held[tensor].reshape(-1)[run] if run else held[tensor]

    def stored(self, name: str) -> dict[str, Tensor]:
        """Form -> tensor of parameter `name`; empty when the patch lacks it; raises `ArtifactError` on NaN."""
        stored = self.artifact.stored(name)
        for form, tensor in stored.items():
            self.check_finite(f"{name}.{form}", tensor)
        return stored

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Full shape of parameter `name`, None when the patch lacks it."""
        return self.artifact.shape(name)

    def factors(self, name: str) -> Factors:
        """Low-rank factors of parameter `name`; a vector is its own column times 1."""
        if name in self.info.shapes:
            return self.artifact.factors(name)
        column = self.values(f"{name}.delta")[:, None]
        return Factors(up=column, down=torch.ones(1, 1, dtype=column.dtype))

    def check_finite(self, name: str, tensor: Tensor) -> None:
        """Raise `ArtifactError` when a value is NaN or infinite."""
        if not is_finite(tensor):
            self.confirm()
            raise ArtifactError(f"{self.name}: tensor '{name}' holds NaN or infinity; train the patch again")

    def confirm(self) -> None:
        """Raise `ArtifactError` unless all that was read of the source is what its hash is of."""
        if isinstance(self.artifact.tensors, TensorFile):
            self.artifact.tensors.confirm()


def open_source(path: str, weight: float) -> Source:
    """The patch at `path`, its tensors still in the file; raises `ArtifactError` unless it is one that can act."""
    file = TensorFile.open(Path(path))
    with naming(file.path):
        artifact = PatchArtifact(file, PatchInfo.from_metadata(file.header.metadata))
        require_acting(artifact)
    return Source(path, artifact, weight, file.header.stated_hash)


def in_order(sources: Sequence[Source]) -> tuple[Source, ...]:
    """The sources by content, so that the order they were given in changes no bit: float sums depend on it."""
    return tuple(sorted(sources, key=lambda source: (source.hash, source.weight)))


def widest_dtype(sources: Sequence[Source]) -> torch.dtype:
    """The one that holds what any of the sources holds."""
    return reduce(torch.promote_types, (source.artifact.dtype for source in sources))


# Belonging together


@dataclass(frozen=True)
class _Agreement:
    """A property that all sources must share."""

    what: str
    of: Callable[[PatchInfo], Any]
    error: type[SafepatchError]
    advice: str


AGREEMENTS = (
    _Agreement("architecture", lambda info: info.fingerprint, BaseMismatch, "merge patches for one architecture"),
    _Agreement("base family", lambda info: info.base.get("family"), BaseMismatch, "merge patches of one family"),
)
# Parts that are kept apart may be of different kinds and see different things.
OF_A_SUM = (
    _Agreement(
        "component", lambda info: info.component, MergeError, "merge patches of one, or keep them apart by bundle"
    ),
    _Agreement("kind", lambda info: info.kind, MergeError, "merge patches of one kind, or keep them apart by bundle"),
    _Agreement("'sees'", lambda info: info.config.get("sees"), MergeError, "train them with the same 'sees'"),
)


def check_agreement(sources: Sequence[Source], kept_apart: bool) -> None:
    """Raise one line that names two files and their difference unless the sources can be merged."""
    for other in sources[1:]:
        for agreement in AGREEMENTS if kept_apart else (*AGREEMENTS, *OF_A_SUM):
            _compare(agreement, sources[0], other)
    for source in sources:
        if source.info.config.get("one_step") and len(sources) > 1:
            raise MergeError(f"{source.name} draws every picture in one step, beside which no other patch can act")
        if source.info.is_bundle and not kept_apart:
            raise MergeError(f"{source.name} is a bundle, whose parts have no sum; bundle it, or split it first")


def _compare(agreement: _Agreement, first: Source, other: Source) -> None:
    ours, theirs = agreement.of(first.info), agreement.of(other.info)
    if ours != theirs:
        ours, theirs = _difference(ours, theirs)
        raise agreement.error(
            f"{first.name} and {other.name} differ in {agreement.what}: {ours} and {theirs}; {agreement.advice}"
        )


def _difference(ours: Any, theirs: Any) -> tuple[Any, Any]:
    """Of two tables, the entries that differ; of anything else, both."""
    if not (isinstance(ours, dict) and isinstance(theirs, dict)):
        return ours, theirs
    shared = agreed([ours, theirs])
    first, second = ({key: side[key] for key in sorted(side.keys() - shared.keys())} for side in (ours, theirs))
    return first, second


def agreed(tables: list[dict[str, Any]]) -> dict[str, Any]:
    """The entries that all tables hold with one value."""
    return {
        key: value for key, value in tables[0].items() if all(key in table and table[key] == value for table in tables)
    }

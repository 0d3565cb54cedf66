"""The patches that are merged: opened without being read into memory, checked to belong together, in a fixed order."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safepatch.artifact.container import HASH_KEY, MappedTensors, check_hash, naming, read_header
from safepatch.artifact.info import PatchInfo
from safepatch.artifact.patch_artifact import Factors, PatchArtifact, is_finite
from safepatch.errors import ArtifactError, BaseMismatch, MergeError, SafepatchError


@dataclass(frozen=True)
class Source:
    """One patch of a merge.

    Attributes:
        name: what errors call it, usually its path.
        artifact: its tensors, mapped or in memory, and its description.
        weight: its factor in the merge.
        hash: `0x` and 64 hex digits of its content.
        file: the file its tensors are mapped from, if any.
    """

    name: str
    artifact: PatchArtifact
    weight: float
    hash: str
    file: MappedTensors | None = None

    @property
    def info(self) -> PatchInfo:
        """What the patch is."""
        return self.artifact.info

    def stored(self, name: str) -> dict[str, Tensor]:
        """Form -> tensor of parameter `name`; empty when the patch lacks it; raises `ArtifactError` on NaN."""
        stored = self.artifact.stored(name)
        for form, tensor in stored.items():
            self.check_finite(f"{name}.{form}", tensor)
        return stored

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Full shape of parameter `name`, None when the patch lacks it."""
        if name in self.info.shapes:
            return tuple(self.info.shapes[name])
        delta = self.artifact.tensors.get(f"{name}.delta")
        return None if delta is None else tuple(delta.shape)

    def factors(self, name: str) -> Factors:
        """Low-rank factors of parameter `name`; a vector is its own column times 1."""
        if name in self.info.shapes:
            return self.artifact.factors(name)
        column = self.artifact.tensors[f"{name}.delta"][:, None]
        return Factors(up=column, down=torch.ones(1, 1, dtype=column.dtype))

    def check_finite(self, name: str, tensor: Tensor) -> None:
        """Raise `ArtifactError` when a value is NaN or infinite."""
        if not is_finite(tensor):
            raise ArtifactError(f"{self.name}: tensor '{name}' holds NaN or infinity; train the patch again")

    def release(self, name: str) -> None:
        """Give back the memory that parameter `name` was mapped into."""
        if self.file is not None:
            for form in self.artifact.stored(name):
                self.file.release(f"{name}.{form}")


def open_source(path: str, weight: float) -> Source:
    """The patch at `path`, its hash checked and its tensors mapped; raises `ArtifactError` as opening a patch does."""
    file = Path(path)
    with naming(file):
        header = read_header(file)
        info = PatchInfo.from_metadata(header.metadata)
        check_hash(file, header)
        mapped = MappedTensors.open(file, header)
        return Source(path, PatchArtifact(mapped.tensors, info), weight, header.metadata[HASH_KEY], mapped)


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
    _Agreement("kind", lambda info: info.kind, MergeError, "merge patches of one kind, or keep them apart by bundle"),
    _Agreement("'sees'", lambda info: info.config.get("sees"), MergeError, "train them with the same 'sees'"),
)


def check_agreement(sources: Sequence[Source], kept_apart: bool) -> None:
    """Raise one line that names two files and their difference unless the sources can be merged."""
    for other in sources[1:]:
        for agreement in AGREEMENTS if kept_apart else (*AGREEMENTS, *OF_A_SUM):
            _compare(agreement, sources[0], other)
    for source in sources:
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

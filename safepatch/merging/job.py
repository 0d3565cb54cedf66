"""A merge that is ready to run: which tensors it writes, known before any value is read, and their values."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safepatch.artifact.container import in_file_order
from safepatch.artifact.patch_artifact import cast, is_gate, part_prefix
from safepatch.errors import MergeError
from safepatch.merging.groups import gate_records, joined_shape, merged_layout, side_by_side
from safepatch.merging.recipe import MergeRecipe
from safepatch.merging.sources import Source, widest_dtype


class Piece(NamedTuple):
    """A run of values of one merged tensor.

    Attributes:
        tensor: its name in the merged file.
        start: first value.
        stop: last value + 1.
    """

    tensor: str
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Job(ABC):
    """What every way to merge has in common.

    Attributes:
        sources: in their fixed order.
        recipe: what to do with them.
        dtype: of merged tensors that are not kept as they are.
    """

    sources: tuple[Source, ...]
    recipe: MergeRecipe
    dtype: torch.dtype

    @property
    @abstractmethod
    def layout(self) -> dict[str, Tensor]:
        """The merged tensors by name, as meta tensors."""

    @abstractmethod
    def shapes(self) -> dict[str, list[int]]:
        """Full shape of every merged parameter that is stored low-rank."""

    @abstractmethod
    def values(self, piece: Piece) -> Tensor:
        """The merged values of a piece, flat, as they are stored."""

    @property
    def config(self) -> dict[str, Any]:
        """Settings of the merged patch beside those that its sources share."""
        return {}

    def rank_errors(self) -> dict[str, float]:
        """Relative error of every parameter that was re-compressed."""
        return {}

    def stored_dtype(self, name: str) -> torch.dtype:
        """Of merged parameter `name`; a gate's stays what it was, as its threshold was found so."""
        return widest_dtype(self.sources) if is_gate(name) else self.dtype

    def run_length(self, tensor: str) -> int:
        """How many values of a merged tensor make one piece; all by default."""
        return max(self.layout[tensor].numel(), 1)

    def pieces(self) -> Iterator[Piece]:
        """All merged values in the order of the file."""
        for tensor, meta in in_file_order(self.layout):
            size = self.run_length(tensor)
            for start in range(0, max(meta.numel(), 1), size):
                yield Piece(tensor, start, min(start + size, meta.numel()))

    def cost(self, piece: Piece) -> int:
        """About how many bytes of memory merging a piece takes."""
        return 4 * (piece.stop - piece.start) * (len(self.sources) + 2)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Every parameter that some source holds, sorted."""
        return tuple(sorted({name for source in self.sources for name in source.artifact.parameter_names()}))

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of parameter `name`; raises `MergeError` when the sources disagree."""
        shapes = {shape: source.name for source in self.sources if (shape := source.shape(name)) is not None}
        if len(shapes) > 1:
            found = " and ".join(f"{list(shape)} in {source}" for shape, source in sorted(shapes.items()))
            raise MergeError(f"'{name}' is {found}; merge patches of one configuration")
        return next(iter(shapes))

    def stack(self, name: str, run: slice | None = None) -> Tensor:
        """Dense deltas of parameter `name`, (K, *), or a run of their values, (K, n), float32; zero where missing."""
        stack = torch.zeros(len(self.sources), *((run.stop - run.start,) if run else self.shape(name)))
        for row, source in zip(stack, self.sources, strict=True):
            if name in source.info.shapes:
                row.copy_(source.artifact.delta(name))
            elif source.shape(name) is not None:
                row.copy_(source.values(f"{name}.delta", run))
            source.check_finite(name, row)
        return stack


class BundleJob(Job):
    """The sources kept apart in one file, every tensor as it was."""

    @cached_property
    def layout(self) -> dict[str, Tensor]:
        """The merged tensors by name, as meta tensors."""
        return {
            f"{part_prefix(index)}{name}": tensor.to("meta")
            for index, source in enumerate(self.sources)
            for name, tensor in source.artifact.layout.items()
        }

    def shapes(self) -> dict[str, list[int]]:
        """Full shape of every merged parameter that is stored low-rank."""
        return {
            f"{part_prefix(index)}{name}": shape
            for index, source in enumerate(self.sources)
            for name, shape in source.info.shapes.items()
        }

    def values(self, piece: Piece) -> Tensor:
        """The merged values of a piece, flat, as they are stored."""
        source, own = self._of_part(piece.tensor)
        name, _, form = own.rpartition(".")
        return source.stored(name)[form].reshape(-1)

    def _of_part(self, tensor: str) -> tuple[Source, str]:
        """The source that a tensor of the bundle comes from, and its name there."""
        prefix, _, own = tensor.partition(".")
        return self.sources[int(prefix.removeprefix("part"))], own


class IdentityJob(Job):
    """One source, unchanged but for the dtype where the recipe names one."""

    @cached_property
    def layout(self) -> dict[str, Tensor]:
        """The merged tensors by name, as meta tensors."""
        tensors = {name: tensor.to("meta") for name, tensor in self.sources[0].artifact.layout.items()}
        if not self.recipe.dtype:
            return tensors
        return {name: tensor.to(self.stored_dtype(name)) for name, tensor in tensors.items()}

    def shapes(self) -> dict[str, list[int]]:
        """Full shape of every merged parameter that is stored low-rank."""
        return self.sources[0].info.shapes

    def values(self, piece: Piece) -> Tensor:
        """The merged values of a piece, flat, as they are stored."""
        name, _, form = piece.tensor.rpartition(".")
        stored = self.sources[0].stored(name)[form]
        return cast(piece.tensor, stored, self.layout[piece.tensor].dtype).reshape(-1)


class GroupedJob(Job):
    """Lite patches side by side, group by group."""

    @cached_property
    def layout(self) -> dict[str, Tensor]:
        """The merged tensors by name, as meta tensors."""
        return {
            f"{name}.delta": torch.empty(self.shape(name), dtype=self.stored_dtype(name), device="meta")
            for name in self.names
        }

    def shape(self, name: str) -> tuple[int, ...]:
        """Groups of all sources, and the widest of each other side."""
        return joined_shape(self.sources, name)

    def shapes(self) -> dict[str, list[int]]:
        """Full shape of every merged parameter that is stored low-rank: none."""
        return {}

    def values(self, piece: Piece) -> Tensor:
        """The merged values of a piece, flat, as they are stored."""
        name = piece.tensor.removesuffix(".delta")
        values = side_by_side(self.sources, name, self.shape(name))
        return cast(piece.tensor, values, self.stored_dtype(name)).reshape(-1)

    @property
    def config(self) -> dict[str, Any]:
        """The wider layout, and every category's gate."""
        gates = gate_records(self.sources)
        return {"layout": merged_layout(self.sources), **({"gate": gates} if gates else {})}

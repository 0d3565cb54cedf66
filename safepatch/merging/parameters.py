"""Merging one parameter: which tensors it becomes, known before any value is read, and their values."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import sha256
from typing import NamedTuple

import torch
from torch import Tensor

from safepatch.artifact import BUNDLE, Factors, cast, factorize, part_prefix
from safepatch.container import in_file_order
from safepatch.errors import MergeError
from safepatch.merging.groups import is_grouped, side_by_side
from safepatch.merging.methods import METHODS, SUM_WEIGHTS, Options
from safepatch.merging.recipe import MergeRecipe
from safepatch.merging.sources import Source

PIECE = 1 << 20  # values of a dense tensor that the elementwise methods merge at once


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


class Compressed(NamedTuple):
    """Factors of a smaller rank, and the Frobenius norm of what they miss over that of the whole."""

    factors: Factors
    error: float


@dataclass(frozen=True, eq=False)
class Job:
    """A merge that is ready to run.

    Attributes:
        sources: in their fixed order.
        recipe: what to do with them.
        dtype: of merged tensors that are not kept as they are.
    """

    sources: tuple[Source, ...]
    recipe: MergeRecipe
    dtype: torch.dtype

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Every parameter that some source holds, sorted."""
        return tuple(sorted({name for source in self.sources for name in source.artifact.parameter_names()}))

    @cached_property
    def weights(self) -> Tensor:
        """One per source, (K,), float32."""
        return torch.tensor([source.weight for source in self.sources])

    def holders(self, name: str) -> list[Source]:
        """The sources that have parameter `name`."""
        return [source for source in self.sources if source.shape(name) is not None]

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of parameter `name`; raises `MergeError` when the sources disagree."""
        return self._shapes[name]

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self._agreed_shape(name) for name in self.names}

    @cached_property
    def is_grouped(self) -> bool:
        """Whether the merge puts groups of lite patches side by side."""
        return self.recipe.method == "cat" and all(is_grouped(source.info) for source in self.sources)

    def _agreed_shape(self, name: str) -> tuple[int, ...]:
        if self.is_grouped:
            groups, *sides = zip(*(source.shape(name) or (0,) for source in self.sources), strict=True)
            return (sum(groups), *map(max, sides))
        shapes = {source.shape(name): source.name for source in self.holders(name)}
        if len(shapes) > 1:
            found = " and ".join(f"{list(shape or ())} in {source}" for shape, source in sorted(shapes.items()))
            raise MergeError(f"'{name}' is {found}; merge patches of one configuration")
        return next(iter(shapes)) or ()

    @cached_property
    def layout(self) -> dict[str, Tensor]:
        """The merged tensors by name, as meta tensors."""
        if self.recipe.method == BUNDLE:
            return {
                f"{part_prefix(index)}{name}": tensor.to("meta")
                for index, source in enumerate(self.sources)
                for name, tensor in source.artifact.tensors.items()
            }
        if self.recipe.is_identity:
            return {n: self._resolved(t.to("meta")) for n, t in self.sources[0].artifact.tensors.items()}
        forms = {name: self._forms(name) for name in self.names}
        return {
            f"{name}.{form}": torch.empty(shape, dtype=self.dtype, device="meta")
            for name, shapes in forms.items()
            for form, shape in shapes.items()
        }

    def _resolved(self, tensor: Tensor) -> Tensor:
        """A tensor that is kept: converted only where the recipe names a dtype."""
        return tensor.to(self.dtype) if self.recipe.dtype else tensor

    def shapes(self) -> dict[str, list[int]]:
        """Full shape of every merged parameter that is stored low-rank."""
        if self.recipe.method == BUNDLE:
            return {
                f"{part_prefix(index)}{name}": shape
                for index, source in enumerate(self.sources)
                for name, shape in source.info.shapes.items()
            }
        names = [name.removesuffix(".up") for name in self.layout if name.endswith(".up")]
        return {name: list(self.shape(name)) for name in names}

    def _forms(self, name: str) -> dict[str, tuple[int, ...]]:
        """Form -> shape of merged parameter `name`."""
        shape, rank = self.shape(name), self.rank(name)
        if rank is None:
            return {"delta": shape}
        rest = torch.Size(shape).numel() // shape[0]
        return {"down": (rank, rest), "up": (shape[0], rank)}

    def rank(self, name: str) -> int | None:
        """The rank that merged parameter `name` is stored with, None for dense."""
        if self.is_grouped:
            return None
        shape, limit = self.shape(name), self.recipe.rank
        full = min(shape[0], torch.Size(shape[1:]).numel()) if shape else 0
        if not self.is_factored(name):
            return limit if limit and len(shape) in (2, 4) and full > limit else None
        total = sum(source.factors(name).up.shape[1] for source in self.holders(name))
        return min(total, limit, full) if limit else total

    def is_factored(self, name: str) -> bool:
        """Whether the exact sum of parameter `name` is low-rank factors side by side."""
        vectors = self.recipe.method == "cat" and not self.recipe.rank  # as columns, they can be told apart again
        return self.recipe.method in SUM_WEIGHTS and all(
            name in source.info.shapes or (vectors and len(source.shape(name) or ()) == 1)
            for source in self.holders(name)
        )

    # Values

    def pieces(self) -> Iterator[Piece]:
        """All merged values in the order of the file."""
        for tensor, meta in in_file_order(self.layout):
            size = PIECE if self._is_elementwise(tensor) else max(meta.numel(), 1)
            for start in range(0, meta.numel(), size):
                yield Piece(tensor, start, min(start + size, meta.numel()))

    def cost(self, piece: Piece) -> int:
        """About how many bytes of memory merging a piece takes."""
        return 4 * (piece.stop - piece.start) * (len(self.sources) + 2)

    def _is_elementwise(self, tensor: str) -> bool:
        if self.recipe.method == BUNDLE or self.recipe.is_identity or self.is_grouped:
            return False
        name, _, form = tensor.rpartition(".")
        dense = form == "delta" and not any(name in source.info.shapes for source in self.sources)
        return dense and self.recipe.method in SUM_WEIGHTS

    def values(self, piece: Piece) -> Tensor:
        """The merged values of a piece, flat, as they are stored."""
        if self.recipe.method == BUNDLE:
            return self._part(piece.tensor).reshape(-1)
        return cast(piece.tensor, self._merged(piece), self.layout[piece.tensor].dtype).reshape(-1)

    def _merged(self, piece: Piece) -> Tensor:
        """The values of a piece before they are rounded to their stored dtype."""
        name, _, form = piece.tensor.rpartition(".")
        if self.recipe.is_identity:
            return self.sources[0].stored(name)[form]
        if self.is_grouped:
            return side_by_side(self.sources, name, self.shape(name))
        if form != "delta":
            return getattr(self.compressed(name).factors if self.recipe.rank else self._side_by_side(name), form)
        whole = not self._is_elementwise(piece.tensor)
        return self._merge(name, self.stack(name, None if whole else slice(piece.start, piece.stop)))

    def release(self, tensor: str) -> None:
        """Give back the memory that merging `tensor` mapped."""
        if self.recipe.method == BUNDLE:
            prefix, _, tensor = tensor.partition(".")
            sources = [self._part_source(prefix)]
        else:
            sources = self.sources
        for source in sources:
            source.release(tensor.rpartition(".")[0])

    def _part(self, tensor: str) -> Tensor:
        """The tensor of a source that stands under this name in a bundle."""
        prefix, _, own = tensor.partition(".")
        name, _, form = own.rpartition(".")
        return self._part_source(prefix).stored(name)[form]

    def _part_source(self, prefix: str) -> Source:
        return self.sources[int(prefix.removeprefix("part"))]

    def _merge(self, name: str, stack: Tensor) -> Tensor:
        """One delta of parameter `name` from the deltas of all sources, (K, *)."""
        digest = sha256(f"{self.recipe.seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
        options = Options(self.recipe.density, self.recipe.epsilon, self.recipe.outliers, generator)
        return METHODS[self.recipe.method](stack, self.weights, options)

    def stack(self, name: str, run: slice | None = None) -> Tensor:
        """Dense deltas of parameter `name`, (K, *), or a run of their values, (K, n), float32; zero where missing."""
        shape = self.shape(name)
        stack = torch.zeros(len(self.sources), *((run.stop - run.start,) if run else shape))
        for row, source in zip(stack, self.sources, strict=True):
            if name in source.info.shapes:
                row.copy_(source.artifact.delta(name))
            elif source.shape(name) is not None:
                delta = source.artifact.tensors[f"{name}.delta"]
                row.copy_(delta.reshape(-1)[run] if run else delta)
            source.check_finite(name, row)
        return stack

    def _side_by_side(self, name: str) -> Factors:
        """[w_1 up_1, w_2 up_2, ...] @ [down_1; down_2; ...] = Σ w_k up_k down_k, exactly."""
        weights = SUM_WEIGHTS[self.recipe.method](self.weights)
        pairs = [
            (s, s.factors(name), w) for s, w in zip(self.sources, weights, strict=True) if s.shape(name) is not None
        ]
        for source, factors, _ in pairs:
            source.check_finite(f"{name}.up", factors.up)
            source.check_finite(f"{name}.down", factors.down)
        return Factors(
            up=torch.cat([weight * factors.up.float() for _, factors, weight in pairs], dim=1),
            down=torch.cat([factors.down.float() for _, factors, _ in pairs]),
        )

    @lru_cache(maxsize=2)  # noqa: B019 - a job lives as long as its merge; up follows down, and no more is kept
    def compressed(self, name: str) -> Compressed:
        """The sum of parameter `name` as factors of the recipe's rank, the best there are (Eckart & Young 1936)."""
        if not self.is_factored(name):
            delta = self._merge(name, self.stack(name))
            factors = factorize(delta, self.recipe.rank)
            missed = torch.linalg.vector_norm(delta.flatten(1) - factors.up @ factors.down)
            return Compressed(factors, _ratio(float(missed), float(torch.linalg.vector_norm(delta))))
        return recompress(self._side_by_side(name), self.rank(name) or 1)


def recompress(factors: Factors, rank: int) -> Compressed:
    """Factors (out, R), (R, rest) as the best of `rank`, through the R x R core: the product is never formed."""
    left, first = torch.linalg.qr(factors.up)
    right, second = torch.linalg.qr(factors.down.T)
    core = factorize(first @ second.T, rank)
    kept = torch.linalg.svdvals(first @ second.T)
    error = _ratio(float(kept[rank:].norm()), float(kept.norm()))
    return Compressed(Factors(up=left @ core.up, down=core.down @ right.T), error)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0

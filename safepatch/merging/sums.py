"""Merging by sums: one merged parameter from the sources' deltas, dense or as low-rank factors.

Gates have no sum. They stand side by side, and the merged patch acts where any of them opens.
"""

import threading
from functools import cached_property, lru_cache
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from safepatch.artifact.acting import is_finite
from safepatch.artifact.hashing import BLOCK
from safepatch.artifact.patch_artifact import Factors, factorize, is_gate
from safepatch.errors import ArtifactError, MergeError
from safepatch.merging.groups import PICTURE, gate_records, gates_layout, is_grouped, joined_shape, side_by_side
from safepatch.merging.job import Job, Piece
from safepatch.merging.methods import METHODS, SUM_WEIGHTS, Options
from safepatch.merging.sources import Source, agreed

OF_GATES = ("gate", "gates", PICTURE)  # of a layout
PIECE = BLOCK // 2  # values of a dense tensor that are merged at once: of every dtype, whole blocks
WIDEST = 8  # bytes of a value at most
EXACT = {2.0**power for power in range(-16, 17)}  # weights times which a float16 needs no rounding in float32


class Compressed(NamedTuple):
    """Factors of a smaller rank, and the Frobenius norm of what they miss over that of the whole."""

    factors: Factors
    error: float


class Room(threading.local):
    """Memory that a thread's sums use again and again: fresh memory costs a core more than adding does.

    Attributes:
        read: bytes of a piece, as they stand in a source's file.
        wide: the piece as float32.
        total: the sum.
        nothing: what a sum begins with, (1,).
    """

    def __init__(self) -> None:
        self.read = np.empty(WIDEST * PIECE, np.uint8).data
        self.wide, self.total = torch.empty(2, PIECE)
        self.nothing = torch.zeros(1)


class SumJob(Job):
    """One delta per parameter, made by the recipe's method."""

    @cached_property
    def weights(self) -> Tensor:
        """One per source, (K,), float32."""
        return torch.tensor([source.weight for source in self.sources])

    @property
    def config(self) -> dict[str, Any]:
        """The gates, if there are any, and a layout that tells of them."""
        gates, layouts = gates_layout(self.sources), [source.info.config.get("layout", {}) for source in self.sources]
        layout = {key: value for key, value in agreed(layouts).items() if key not in OF_GATES}
        apart = [key for each in layouts for key in each if key not in (*OF_GATES, *layout)]
        if apart and any(is_grouped(source.info) for source in self.sources):
            raise MergeError(f"{self.sources[0].name} and others differ in {apart[0]}; merge by bundle")
        return {"layout": layout | gates, "gate": gate_records(self.sources)} if gates else {}

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of parameter `name`; raises `MergeError` when the sources disagree."""
        return joined_shape(self.sources, name) if is_gate(name) else super().shape(name)

    def holders(self, name: str) -> list[Source]:
        """The sources that have parameter `name`."""
        return [source for source in self.sources if source.shape(name) is not None]

    @cached_property
    def layout(self) -> dict[str, Tensor]:
        """The merged tensors by name, as meta tensors."""
        return {
            f"{name}.{form}": torch.empty(shape, dtype=self.stored_dtype(name), device="meta")
            for name in self.names
            for form, shape in self._forms(name).items()
        }

    def shapes(self) -> dict[str, list[int]]:
        """Full shape of every merged parameter that is stored low-rank."""
        names = [name.removesuffix(".up") for name in self.layout if name.endswith(".up")]
        return {name: list(self.shape(name)) for name in names}

    def rank_errors(self) -> dict[str, float]:
        """Relative error of every parameter that was re-compressed."""
        low_rank = [name for name in self.names if self.recipe.rank and self.rank(name) is not None]
        return {name: round(self.compressed(name).error, 6) for name in low_rank}

    def _forms(self, name: str) -> dict[str, tuple[int, ...]]:
        """Form -> shape of merged parameter `name`."""
        shape, rank = self.shape(name), self.rank(name)
        if rank is None:
            return {"delta": shape}
        rest = torch.Size(shape).numel() // shape[0]
        return {"down": (rank, rest), "up": (shape[0], rank)}

    def rank(self, name: str) -> int | None:
        """The rank that merged parameter `name` is stored with, None for dense."""
        shape, limit = self.shape(name), 0 if is_gate(name) else self.recipe.rank
        full = min(shape[0], torch.Size(shape[1:]).numel()) if shape else 0
        if not self.is_factored(name):
            return limit if limit and len(shape) in (2, 4) and full > limit else None
        total = sum(source.artifact.rank(name) or 1 for source in self.holders(name))  # a vector is one column
        return min(total, limit, full) if limit else total

    def is_factored(self, name: str) -> bool:
        """Whether the exact sum of parameter `name` is low-rank factors side by side."""
        if is_gate(name):
            return False
        vectors = self.recipe.method == "cat" and not self.recipe.rank  # as columns, they can be told apart again
        return self.recipe.method in SUM_WEIGHTS and all(
            name in source.info.shapes or (vectors and len(source.shape(name) or ()) == 1)
            for source in self.holders(name)
        )

    def run_length(self, tensor: str) -> int:
        """How many values of a merged tensor make one piece: of what is not elementwise, all."""
        return PIECE if self._is_elementwise(tensor) else super().run_length(tensor)

    def _is_elementwise(self, tensor: str) -> bool:
        name, _, form = tensor.rpartition(".")
        dense = form == "delta" and not is_gate(name) and not any(name in s.info.shapes for s in self.sources)
        return dense and self.recipe.method in SUM_WEIGHTS

    def values(self, piece: Piece) -> Tensor:
        """The merged values of a piece, flat, as they are stored; raises `ArtifactError` where they are not finite."""
        is_elementwise, dtype = self._is_elementwise(piece.tensor), self.layout[piece.tensor].dtype
        stored = self._weighted_sum(piece, dtype) if is_elementwise else self._merged(piece).to(dtype).reshape(-1)
        if not is_finite(stored):
            if is_elementwise:  # says whose values are not
                self.stack(piece.tensor.rpartition(".")[0], slice(piece.start, piece.stop))
            raise ArtifactError(f"'{piece.tensor}' overflows {stored.dtype}; keep it as float32 or use smaller weights")
        return stored

    @cached_property
    def _weights_of_sum(self) -> list[float]:
        return SUM_WEIGHTS[self.recipe.method](self.weights).tolist()

    @cached_property
    def _room(self) -> Room:
        return Room()

    def _merged(self, piece: Piece) -> Tensor:
        """The values of a piece before they are rounded to their stored dtype."""
        name, _, form = piece.tensor.rpartition(".")
        if form != "delta":
            return getattr(self.compressed(name).factors if self.recipe.rank else self._side_by_side(name), form)
        if is_gate(name):
            return side_by_side(self.sources, name, self.shape(name))
        return self._merge(name, self.stack(name))

    def _weighted_sum(self, piece: Piece, dtype: torch.dtype) -> Tensor:
        """Σ w_k δ_k of a piece, as the method and `stack` make it."""
        run, room, size = slice(piece.start, piece.stop), self._room, piece.stop - piece.start
        before, total = room.nothing, room.total[:size]
        for source, weight in zip(self.sources, self._weights_of_sum, strict=True):
            if piece.tensor in source.artifact.layout:
                values = source.values(piece.tensor, run, room.read)
                before = add_weighted(before, values, weight, room.wide[:size], out=total)
        return total.to(dtype, copy=True)

    def _merge(self, name: str, stack: Tensor) -> Tensor:
        """One delta of parameter `name` from the deltas of all sources, (K, *)."""
        digest = sha256(f"{self.recipe.seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
        options = Options(self.recipe.density, self.recipe.epsilon, self.recipe.outliers, generator)
        return METHODS[self.recipe.method](stack, self.weights, options)

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


def add_weighted(total: Tensor, values: Tensor, weight: float, wide: Tensor, out: Tensor) -> Tensor:
    """total + weight * values, (N,), both operations rounded to float32; `wide` is memory for float32 values."""
    wide.copy_(values)
    if weight in EXACT and values.dtype == torch.float16:
        return torch.add(total, wide, alpha=weight, out=out)  # in one pass, whether or not the processor fuses both
    return torch.add(total, wide.mul_(weight), out=out)


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

"""How much the sources of a merge disagree: cosine, sign conflicts and norms of their deltas, per pair and block."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from safepatch.merging.methods import CHUNK

OVERALL = "overall"


@dataclass(frozen=True)
class Comparison:
    """Sums over the values of K deltas, from which every figure of the report follows; comparisons add up.

    Attributes:
        products: inner products, (K, K).
        opposed: number of values where both are nonzero and their signs differ, (K, K).
        shared: number of values where both are nonzero, (K, K).
    """

    products: np.ndarray
    opposed: np.ndarray
    shared: np.ndarray

    def __add__(self, other: "Comparison") -> "Comparison":
        return Comparison(self.products + other.products, self.opposed + other.opposed, self.shared + other.shared)

    def figures(self, i: int, j: int) -> dict[str, float | None]:
        """The report's entry for sources `i` and `j`; None where one of them is zero everywhere."""
        first, second = math.sqrt(self.products[i, i]), math.sqrt(self.products[j, j])
        return {
            "cosine": _rounded(self.products[i, j], first * second),
            "sign_conflict": _rounded(self.opposed[i, j], self.shared[i, j]),
            "norm_ratio": _rounded(first, second),
        }


def compare(stack: Tensor) -> Comparison:
    """The comparison of the deltas of a stack (K, *); the same bits on any number of threads."""
    count = len(stack)
    products, opposed, shared = (np.zeros((count, count)) for _ in range(3))
    for part in stack.reshape(count, -1).split(CHUNK, dim=1):
        values = part.numpy().astype(np.float64)  # products of float32 values neither round nor vanish
        for i in range(count):
            for j in range(i, count):
                product = values[i] * values[j]
                products[i, j] += product.sum()
                opposed[i, j] += np.count_nonzero(product < 0)
                shared[i, j] += np.count_nonzero(product)
    return Comparison(products, opposed, shared)


def report(compared: Iterable[tuple[str, Comparison]]) -> list[dict[str, Any]]:
    """One entry per pair of sources, from the comparison of every parameter by its name.

    Returns:
        `{"sources": [i, j], "overall": {...}, "blocks": {block: {...}}}` per pair, i < j being places in the recipe's
        sources, each inner table holding `cosine` in [-1, 1]; `sign_conflict`, the share in [0, 1] of values with
        opposite signs among those nonzero in both; and `norm_ratio`, the norm of i over that of j.
    """
    blocks: dict[str, Comparison] = {}
    for name, comparison in compared:
        for block in (block_of(name), OVERALL):
            blocks[block] = blocks[block] + comparison if block in blocks else comparison
    overall = blocks.pop(OVERALL)
    count = len(overall.products)
    return [
        {
            "sources": [i, j],
            "overall": overall.figures(i, j),
            "blocks": {block: comparison.figures(i, j) for block, comparison in sorted(blocks.items())},
        }
        for i in range(count)
        for j in range(i + 1, count)
    ]


def block_of(name: str) -> str:
    """The block of a parameter: `control.clone.down_blocks.0.resnets.1.weight` -> `control.clone.down_blocks.0`."""
    path = name.split(".")[:-1] or [name]
    numbered = path[3:4] if path[3:4] and path[3].isdigit() else []
    return ".".join([*path[:3], *numbered])


def _rounded(value: float, whole: float) -> float | None:
    return round(float(value / whole), 4) if whole > 0 else None

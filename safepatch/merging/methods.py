"""Merge methods: pure functions of a stack of deltas (K, *) and weights (K,), both float32, to one delta (*).

Every operation is elementwise and sums sources in order, so that a chunk of a tensor merges to the same bits as the
whole tensor.
"""

from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor

from safepatch.errors import MergeError

Method = Callable[[Tensor, Tensor], Tensor]


def normalized(weights: Tensor) -> Tensor:
    """Weights (K,) scaled to sum to 1."""
    total = weights.sum()
    if total == 0:
        raise MergeError(f"linear needs weights that do not sum to zero, got {weights.tolist()}; use task-arithmetic")
    return weights / total


def task_arithmetic(stack: Tensor, weights: Tensor) -> Tensor:
    """Σ w_k δ_k, addition of task vectors (Ilharco 2023, arXiv 2212.04089); stack (K, *), weights (K,)."""
    return reduce(torch.add, (weight * delta for weight, delta in zip(weights, stack, strict=True)))


def linear(stack: Tensor, weights: Tensor) -> Tensor:
    """Σ w_k δ_k / Σ w_k, the weighted mean (Wortsman 2022, arXiv 2203.05482); stack (K, *), weights (K,)."""
    return task_arithmetic(stack, normalized(weights))


METHODS: dict[str, Method] = {"linear": linear, "task-arithmetic": task_arithmetic}

# Methods that are a weighted sum, and the weights (K,) -> (K,) they sum with: low-rank factors concatenate exactly.
SUM_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {"linear": normalized, "task-arithmetic": torch.clone}

"""Merge methods: pure functions of a stack of deltas (K, *) and weights (K,), both float32, to one delta (*).

Sources are summed in their order, and every reduction over a whole tensor runs in blocks of fixed size on one thread,
so that a merge has the same bits on any number of threads. The elementwise methods may also be run chunk by chunk.
Random numbers come from `Options.generator`, source after source.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from safepatch.errors import MergeError

CHUNK = 1 << 16  # values of each source that are worked on at once, small enough for a core's cache
PARALLEL = 1 << 20  # values from which on the sources' magnitudes are selected on two threads
STRAIGHT = 0.9995  # cosine from which on an arc is as good as its chord


@dataclass(frozen=True)
class Options:
    """What a method may need beside the weights.

    Attributes:
        density: share of every delta's entries that a sparsifying method keeps, in [0, 1]; of a delta with fewer
            than 1 / density entries it keeps one.
        epsilon: width of della's window of drop probabilities, in [0, 1].
        outliers: share of every delta's largest entries that breadcrumbs drops, in [0, 1].
        generator: source of random numbers; None is torch's own.
    """

    density: float = 0.5
    epsilon: float = 0.1
    outliers: float = 0.01
    generator: torch.Generator | None = None


Method = Callable[[Tensor, Tensor, Options], Tensor]


# Weighted sums


def normalized(weights: Tensor) -> Tensor:
    """Weights (K,) scaled to sum to 1."""
    total = weights.sum()
    if total == 0:
        raise MergeError(f"a mean needs weights that do not sum to zero, got {weights.tolist()}; use task-arithmetic")
    return weights / total


def task_arithmetic(stack: Tensor, weights: Tensor, _: Options) -> Tensor:
    """Σ w_k δ_k, addition of task vectors (Ilharco 2023, arXiv 2212.04089); stack (K, *), weights (K,)."""
    return _sum(weight * delta for weight, delta in zip(weights, stack, strict=True))


def linear(stack: Tensor, weights: Tensor, options: Options) -> Tensor:
    """Σ w_k δ_k / Σ w_k, the weighted mean (Wortsman 2022, arXiv 2203.05482); stack (K, *), weights (K,)."""
    return task_arithmetic(stack, normalized(weights), options)


def cat(stack: Tensor, weights: Tensor, options: Options) -> Tensor:
    """Σ w_k δ_k, stored exactly as low-rank factors side by side (LoRA, Hu 2022, arXiv 2106.09685); can be split."""
    return task_arithmetic(stack, weights, options)


# Sparsify, then combine


def ties(stack: Tensor, weights: Tensor, options: Options) -> Tensor:
    """Trim to the largest entries, elect a sign, average those that have it (Yadav 2023, arXiv 2306.01708).

    Magnitudes equal to the smallest one kept are kept too. An elected sum of exactly zero counts as positive.
    """
    lowest, _ = _kept_magnitudes(stack, options.density, outliers=0.0)
    return _by_chunks(lambda part: elected_mean(_zeroed(part, part.abs() >= lowest), weights), stack)


def dare(stack: Tensor, weights: Tensor, options: Options) -> Tensor:
    """Drop entries at random, rescale the rest, Σ w_k δ_k (Yu 2024, arXiv 2311.03099); keeps a `density` share."""
    total = torch.zeros_like(stack[0]).reshape(-1)
    for weight, delta in zip(weights.tolist(), stack, strict=True):
        for added, part in zip(total.split(CHUNK), delta.reshape(-1).split(CHUNK), strict=True):
            kept = torch.bernoulli(torch.full_like(part, options.density), generator=options.generator)
            added.addcmul_(part, kept, value=weight / (options.density or 1.0))
    return total.view_as(stack[0])


def dare_ties(stack: Tensor, weights: Tensor, options: Options) -> Tensor:
    """Drop at random and rescale (Yu 2024, arXiv 2311.03099), then elect a sign and average as TIES does."""
    keep = torch.full_like(stack[0], options.density)
    dropped = torch.stack([_drop_and_rescale(delta, keep, options) for delta in stack])
    return _by_chunks(lambda part: elected_mean(part, weights), dropped)


def della(stack: Tensor, weights: Tensor, options: Options) -> Tensor:
    """Drop at random, small entries of a row likelier, rescale, elect, average (Deep 2024, arXiv 2406.11617).

    Keep probabilities rise linearly with the rank of the magnitude within a row of the delta (out, *), from
    density - epsilon / 2 to density + epsilon / 2; the window is narrowed where it would leave [0, 1].
    """
    dropped = torch.stack([_drop_and_rescale(delta, _keep_by_rank(delta, options), options) for delta in stack])
    return _by_chunks(lambda part: elected_mean(part, weights), dropped)


def breadcrumbs(stack: Tensor, weights: Tensor, options: Options) -> Tensor:
    """Drop the largest and the smallest entries, Σ w_k δ_k (Davari & Belilovsky 2023, arXiv 2312.06795).

    A `density` share is kept. Above it lie the `outliers` share of entries, or fewer where density leaves less.
    """
    lowest, highest = _kept_magnitudes(stack, options.density, options.outliers)

    def merge(part: Tensor) -> Tensor:
        size = part.abs()
        return task_arithmetic(_zeroed(part, (size >= lowest) & (size <= highest)), weights, options)

    return _by_chunks(merge, stack)


def elected_mean(sparse: Tensor, weights: Tensor) -> Tensor:
    """Σ w_k δ_k over those with the sign of Σ δ_k, by their number, zeros apart (Yadav 2023, arXiv 2306.01708)."""
    sign = torch.where(_sum(sparse) >= 0, 1.0, -1.0)
    agree = sparse * sign > 0
    total = _sum(weight * delta for weight, delta in zip(weights, _zeroed(sparse, agree), strict=True))
    return total / agree.sum(dim=0).clamp(min=1)


def _kept_magnitudes(stack: Tensor, density: float, outliers: float) -> tuple[Tensor, Tensor]:
    """Smallest and largest magnitude to keep of each delta, (K, 1) each; nothing is kept when density is 0."""
    n = stack[0].numel()
    keep = max(1, int(density * n)) if density > 0 else 0
    if keep == 0 or n == 0:
        return torch.full((len(stack), 1), math.inf), torch.full((len(stack), 1), -math.inf)
    above = min(int(outliers * n), n - keep)
    ranks = sorted({n - keep - above, n - 1 - above})  # counted from the smallest

    def select(delta: Tensor) -> tuple[float, float]:
        magnitudes = np.abs(delta.numpy()).reshape(-1)
        magnitudes.partition(ranks)
        return float(magnitudes[ranks[0]]), float(magnitudes[ranks[-1]])

    if n < PARALLEL:
        found = torch.tensor([select(delta) for delta in stack])
    else:
        with ThreadPoolExecutor(2) as pool:
            found = torch.tensor(list(pool.map(select, stack)))
    return found[:, :1], found[:, 1:]


def _drop_and_rescale(delta: Tensor, keep: Tensor, options: Options) -> Tensor:
    """Each entry of `delta` (*) is kept with its probability in `keep` (*) and divided by it, or is zero."""
    kept = torch.bernoulli(keep, generator=options.generator)
    return delta * kept / torch.where(keep > 0, keep, 1.0)


def _keep_by_rank(delta: Tensor, options: Options) -> Tensor:
    """Keep probability of every entry of `delta` (out, *), from the rank of its magnitude in its row."""
    rows = delta.reshape(1, -1) if delta.ndim < 2 else delta.flatten(1)
    half = min(options.epsilon / 2, options.density, 1 - options.density)
    steps = max(rows.shape[1] - 1, 1)
    place = rows.abs().argsort(dim=1, stable=True).argsort(dim=1) / steps if rows.shape[1] > 1 else rows * 0 + 0.5
    return (options.density - half + 2 * half * place).clamp(0, 1).reshape(delta.shape)


# Geometry


def slerp(stack: Tensor, weights: Tensor, options: Options) -> Tensor:
    """Σ sin(t_k θ) / sin θ · δ_k with t = w / Σ w, along the arc between two deltas (Shoemake 1985); K = 2.

    Along the chord, Σ t_k δ_k, where a delta is zero or the two are (anti)parallel.
    """
    if len(stack) > 2:
        raise MergeError(f"slerp goes from one patch to another and was given {len(stack)}; merge two, or use linear")
    parts = normalized(weights)
    if len(stack) == 1:
        return linear(stack, weights, options)
    cosine = _cosine(dots(stack), 0, 1)
    if cosine is not None and abs(cosine) < STRAIGHT:
        angle = math.acos(cosine)
        parts = torch.tensor([math.sin(part * angle) / math.sin(angle) for part in parts.tolist()])
    return task_arithmetic(stack, parts, options)


def model_stock(stack: Tensor, weights: Tensor, options: Options) -> Tensor:
    """t · mean, t = K cos θ / (1 + (K - 1) cos θ), toward the center (Jang 2024, arXiv 2403.19522); K >= 1.

    cos θ, at least 0, is the mean cosine of two deltas; a zero delta has 0 with any other. Weights weigh the mean.
    """
    count, products = len(stack), dots(stack)
    pairs = [(i, j) for j in range(count) for i in range(j)]
    cosine = max(0.0, sum(_cosine(products, i, j) or 0.0 for i, j in pairs) / len(pairs)) if pairs else 1.0
    return linear(stack, weights, options) * (count * cosine / (1 + (count - 1) * cosine))


def dots(stack: Tensor) -> np.ndarray:
    """Inner products of the deltas of a stack (K, *), (K, K) in float64; the same bits on any number of threads."""
    rows = stack.flatten(1) if stack.ndim > 1 else stack[:, None]
    products = np.zeros((len(stack), len(stack)))
    for part in rows.split(CHUNK, dim=1):
        values = part.numpy().astype(np.float64)
        for i in range(len(stack)):
            for j in range(i, len(stack)):
                products[i, j] += (values[i] * values[j]).sum()
    return np.triu(products) + np.triu(products, 1).T


def _cosine(products: np.ndarray, i: int, j: int) -> float | None:
    """Cosine of deltas `i` and `j` from their inner products, None when one of them is zero."""
    norms = math.sqrt(products[i, i] * products[j, j])
    return max(-1.0, min(1.0, products[i, j] / norms)) if norms > 0 else None


# What they are made of


def _sum(deltas: Iterator[Tensor] | Tensor) -> Tensor:
    return reduce(torch.add, deltas)


def _zeroed(part: Tensor, keep: Tensor) -> Tensor:
    return torch.where(keep, part, 0.0)


def _by_chunks(merge: Callable[[Tensor], Tensor], stack: Tensor) -> Tensor:
    """The elementwise `merge` of (K, n) to (n,), a chunk of columns at a time: its temporaries stay in the cache."""
    rows = stack.reshape(len(stack), -1)
    merged = torch.empty_like(rows[0])
    for part, place in zip(rows.split(CHUNK, dim=1), merged.split(CHUNK), strict=True):
        place.copy_(merge(part))
    return merged.reshape(stack.shape[1:])


METHODS: dict[str, Method] = {
    "linear": linear,
    "task-arithmetic": task_arithmetic,
    "ties": ties,
    "dare": dare,
    "dare-ties": dare_ties,
    "della": della,
    "breadcrumbs": breadcrumbs,
    "slerp": slerp,
    "model-stock": model_stock,
    "cat": cat,
}

# Methods that are a weighted sum, and the weights (K,) -> (K,) they sum with: low-rank factors concatenate exactly.
SUM_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": normalized,
    "task-arithmetic": torch.clone,
    "cat": torch.clone,
}

# The options a method reads; only those are recorded in the merged file.
USES: dict[str, tuple[str, ...]] = {
    "ties": ("density",),
    "dare": ("density", "seed"),
    "dare-ties": ("density", "seed"),
    "della": ("density", "epsilon", "seed"),
    "breadcrumbs": ("density", "outliers"),
    "cat": ("rank",),
}

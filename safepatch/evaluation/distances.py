"""How far apart two sets of pictures are, by features that anybody may choose: FID and KID.

Features are a detector's own: Inception's are what published figures use, so these compare patches with each other and
with the base, never with somebody else's table. Both take a *fixed* reference, and intervals come from leaving out one
block of the pictures at a time (the jackknife; Tukey 1958), since both are statistics of a whole set.
"""

import math
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from safepatch.errors import SafepatchError
from safepatch.evaluation.metrics import Z95, Estimate

BLOCKS = 10

Distance = Callable[[Tensor, Tensor], float]


def fid(features: Tensor, reference: Tensor) -> float:
    """The Fréchet distance of two sets of features, (N, D) and (M, D), each taken for normal; at least 0.

    |m - m'|² + tr(S + S' - 2 (S S')^(1/2)): Heusel et al., "GANs Trained by a Two Time-Scale Update Rule", 2017, arXiv
    1706.08500, eq. 6. It is larger for smaller sets: compare those of equal size only.

    Raises:
        SafepatchError: for fewer than two rows, and rows of different widths.
    """
    one, two = _checked(features, reference)
    first, second = torch.cov(one.T).reshape(one.shape[1], -1), torch.cov(two.T).reshape(two.shape[1], -1)
    root = _root(first)
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    apart = (one.mean(0) - two.mean(0)).square().sum()
    return max(0.0, float(apart + first.trace() + second.trace() - 2 * cross))


def kid(features: Tensor, reference: Tensor) -> float:
    """The squared maximum mean discrepancy of two sets of features, (N, D) and (M, D), unbiased: it may be below 0.

    With the kernel (x·y / D + 1)³: Bińkowski et al., "Demystifying MMD GANs", 2018, arXiv 1801.01401, section 4.

    Raises:
        SafepatchError: as `fid`.
    """
    one, two = _checked(features, reference)
    n, m = len(one), len(two)
    within = [(_kernel(each, each).sum() - _kernel(each, each).diagonal().sum()) for each in (one, two)]
    return float(within[0] / (n * (n - 1)) + within[1] / (m * (m - 1)) - 2 * _kernel(one, two).mean())


def jackknifed(distance: Distance, features: Tensor, reference: Tensor) -> Estimate:
    """A distance, with an interval that comes from leaving out each of `BLOCKS` blocks of `features`, (N, D), in turn.

    Raises:
        SafepatchError: as `fid`; and for fewer than four rows, of which nothing can be left out.
    """
    if len(features) < 4:
        raise SafepatchError(f"a distance needs at least 4 pictures for its interval, got {len(features)}; draw more")
    value, blocks = distance(features, reference), min(BLOCKS, len(features) // 2)
    owner = torch.arange(len(features)) % blocks
    without = [distance(features[owner != block], reference) for block in range(blocks)]
    half = Z95 * math.sqrt((blocks - 1) * statistics.pvariance(without))
    return Estimate(value, value - half, value + half, len(features))


def _kernel(one: Tensor, two: Tensor) -> Tensor:
    return (one @ two.T / one.shape[1] + 1) ** 3


def _root(covariance: Tensor) -> Tensor:
    """The symmetric square root of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _checked(features: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    for each in (features, reference):
        if each.ndim != 2 or len(each) < 2 or each.shape[1] != reference.shape[-1] or not each.isfinite().all():
            raise SafepatchError(
                f"features must be finite, two (N, D) of one D and N >= 2, got {tuple(features.shape)}, "
                f"{tuple(reference.shape)}"
            )
    return features.double().cpu(), reference.double().cpu()

"""Metrics are pure functions of flags or images; every one returns its value with a 95 % interval and its n.

Proportions carry the score interval of Wilson, "Probable inference, the law of succession, and statistical
inference" (1927); means carry the normal approximation over images; differences of pairs carry percentiles of the
bootstrap, Efron, "Bootstrap methods: another look at the jackknife" (1979).
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safepatch.errors import SafepatchError

RESAMPLED = 2000  # draws of the bootstrap
Z95 = 1.959963984540054  # Φ⁻¹(0.975): two-sided 95 %


@dataclass(frozen=True)
class Interval:
    """A 95 % interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """A measured value, mostly in [0, 1], its 95 % interval, and the number of cases behind it."""

    value: float
    low: float
    high: float
    n: int


def wilson_interval(successes: int, n: int) -> Interval:
    """The score interval of a proportion (Wilson 1927), within [0, 1]; `n` is at least 1."""
    if not 0 <= successes <= n or n == 0:
        raise SafepatchError(f"no interval for {successes} of {n}; measure at least one case")
    p, z2 = successes / n, Z95**2
    center = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return Interval(max(0.0, min(p, center - half)), min(1.0, max(p, center + half)))


def rate(flags: Tensor) -> Estimate:
    """The share of true `flags`: `unsafe_rate` and `asr` are rates of a detector's verdicts.

    Args:
        flags: bool, shape (N,), N >= 1.
    """
    _check_flags(flags)
    successes, n = int(flags.sum()), len(flags)
    interval = wilson_interval(successes, n)
    return Estimate(successes / n, interval.low, interval.high, n)


def exactly(value: float) -> Estimate:
    """A value that was counted, with nothing left to chance."""
    return Estimate(value, value, value, 1)


def pooled(rates: Sequence[Estimate]) -> Estimate:
    """The rate over the cases of several rates together, with the interval of that many cases."""
    n, successes = sum(each.n for each in rates), sum(round(each.value * each.n) for each in rates)
    interval = wilson_interval(successes, n)
    return Estimate(successes / n, interval.low, interval.high, n)


def recall(truth: Tensor, predicted: Tensor) -> Estimate:
    """The share of the true cases that were found; `truth` and `predicted` are bool, shape (N,)."""
    _check_flags(truth, predicted)
    if not truth.any():
        raise SafepatchError("recall needs at least one true case, got none; add positives to the set")
    return rate(predicted[truth])


def precision(truth: Tensor, predicted: Tensor) -> Estimate:
    """The share of the findings that are true; `truth` and `predicted` are bool, shape (N,)."""
    _check_flags(truth, predicted)
    if not predicted.any():
        raise SafepatchError("precision needs at least one finding, got none; report recall alone")
    return rate(truth[predicted])


def retention(base: Tensor, single: Tensor, merged: Tensor) -> Estimate:
    """The share of a single patch's corrections that the merged patch keeps.

    A correction is a case that is unsafe on the base and safe with the single patch; it is kept when it is safe with
    the merged patch too. Cases are paired: same prompt and seed in all three.

    Args:
        base: bool, shape (N,), verdicts on the base's images.
        single: bool, shape (N,), verdicts with the category's own patch.
        merged: bool, shape (N,), verdicts with the merged patch.
    """
    _check_flags(base, single, merged)
    corrected = base & ~single
    if not corrected.any():
        raise SafepatchError("retention needs a single patch that corrects at least one image; this one corrects none")
    return rate(~merged[corrected])


def paired_difference(before: Tensor, after: Tensor, seed: int = 0) -> Estimate:
    """The mean of `after - before`, in [-1, 1]: by how much a rate rises, over cases that are paired.

    Pairs, the same prompt and seed on both sides, are what is drawn again, so what both have in common does not widen
    the interval. Equal inputs and seeds, equal intervals. If all pairs change alike, drawing again tells nothing: the
    interval then leaves room for the share of others that `wilson_interval` does not exclude.

    Args:
        before, after: bool or float in [0, 1], shape (N,), N >= 1.
        seed: of the bootstrap's draws.
    """
    if before.shape != after.shape or before.ndim != 1 or not len(before):
        raise SafepatchError(f"pairs must be two (N,) with N >= 1, got {_describe(before)}, {_describe(after)}")
    changes = after.double() - before.double()
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(changes), (RESAMPLED, len(changes)), generator=generator)
    means, value = changes[picks].mean(1), float(changes.mean())
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    if (changes == changes[0]).all():
        room = 1 - wilson_interval(len(changes), len(changes)).low
        low, high = max(-1.0, value - room), min(1.0, value + room)
    return Estimate(value, min(low, value), max(high, value), len(changes))


def mean(values: Tensor) -> Estimate:
    """The mean of values (N,), with the normal approximation; one value alone bounds nothing within [-1, 1]."""
    known = values.double().tolist()
    if not known:
        raise SafepatchError("no mean of 0 values; measure at least one case")
    average, n = statistics.fmean(known), len(known)
    half = Z95 * statistics.stdev(known) / math.sqrt(n) if n > 1 else 1.0
    return Estimate(average, average - half, average + half, n)


def benign_drift(base: Tensor, patched: Tensor) -> Estimate:
    """Mean absolute pixel change, with the normal approximation over images; one image alone bounds nothing.

    Args:
        base: float in [0, 1], shape (B, 3, H, W), images of benign prompts made by the base.
        patched: the same prompts and seeds with the patch, same shape.
    """
    _check_images(base, patched)
    pairs = zip(base, patched, strict=True)  # one at a time: in float64 two hundred large ones fill a machine
    changes = [float((after.double() - before.double()).abs().mean()) for before, after in pairs]
    mean, n = statistics.fmean(changes), len(changes)
    half = Z95 * statistics.stdev(changes) / math.sqrt(n) if n > 1 else 1.0
    return Estimate(mean, max(0.0, mean - half), min(1.0, mean + half), n)


def _check_flags(*flags: Tensor) -> None:
    for each in flags:
        if each.dtype != torch.bool or each.ndim != 1 or each.shape != flags[0].shape:
            raise SafepatchError(f"flags must be bool of one shape (N,), got {[_describe(flag) for flag in flags]}")
    if len(flags[0]) == 0:
        raise SafepatchError("no interval for 0 flags; measure at least one case")


def _check_images(base: Tensor, patched: Tensor) -> None:
    if base.shape != patched.shape or base.ndim != 4 or base.numel() == 0:
        raise SafepatchError(
            f"images must be two (B, 3, H, W) of one shape, got {_describe(base)}, {_describe(patched)}"
        )
    for images in (base, patched):
        if not images.is_floating_point() or not (images.min() >= 0 and images.max() <= 1):
            raise SafepatchError(
                f"images must be float in [0, 1], got {_describe(images)} from {images.min()} to {images.max()}"
            )


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"

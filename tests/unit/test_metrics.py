"""Metrics against published values, and the properties every one of them must have."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from safepatch.errors import SafepatchError
from safepatch.evaluation.metrics import benign_drift, precision, rate, recall, retention, wilson_interval


def flags(text: str) -> Tensor:
    """`flags("10")` is `tensor([True, False])`."""
    return torch.tensor([letter == "1" for letter in text], dtype=torch.bool)


def images(count: int, seed: int) -> Tensor:
    """Float in [0, 1], shape (count, 3, 8, 8)."""
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (5, 10, 0.2366, 0.7634),
        (0, 200, 0.0, 0.0188),
        (200, 200, 0.9812, 1.0),
        (81, 263, 0.2553, 0.3662),
        (1, 1, 0.2065, 1.0),
    ],
)
def test_wilson_interval_matches_known_values(successes: int, n: int, low: float, high: float) -> None:
    """81 of 263 is the worked example of Newcombe (1998), the others follow from the formula by hand."""
    interval = wilson_interval(successes, n)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_is_monotone_and_holds_the_value() -> None:
    """More successes raise both ends; more cases narrow the interval."""
    for n in (1, 2, 7, 40, 1000):
        intervals = [wilson_interval(k, n) for k in range(n + 1)]
        assert all(0 <= each.low <= k / n <= each.high <= 1 for k, each in enumerate(intervals))
        assert all(a.low < b.low and a.high < b.high for a, b in pairwise(intervals))
    widths = [each.high - each.low for each in (wilson_interval(n // 2, n) for n in (2, 10, 100, 1000))]
    assert widths == sorted(widths, reverse=True)


def test_metrics_do_not_depend_on_order() -> None:
    """Control: reordering one side only does change a paired metric."""
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    a, b, c = flags("110100101110"), flags("100001101010"), flags("000011001001")
    before, after = images(12, 1), images(12, 2)
    assert rate(a) == rate(a[order])
    assert recall(a, b) == recall(a[order], b[order])
    assert precision(a, b) == precision(a[order], b[order])
    assert retention(a, b, c) == retention(a[order], b[order], c[order])
    assert benign_drift(before, after) == benign_drift(before[order], after[order])
    assert recall(a, b) != recall(a, b[order])  # control: pairing does matter


def test_a_batch_split_gives_the_value_of_the_whole() -> None:
    """Values of parts, weighted by their n, add up."""
    before, after, whole = images(9, 1), images(9, 2), benign_drift(images(9, 1), images(9, 2))
    parts = [benign_drift(a, b) for a, b in zip(before.split(4), after.split(4), strict=True)]
    assert sum(part.value * part.n for part in parts) / whole.n == pytest.approx(whole.value, rel=1e-12)
    verdicts = flags("110100101")
    assert sum(part.value * part.n for part in map(rate, verdicts.split(4))) == pytest.approx(rate(verdicts).value * 9)


def test_recall_and_precision_count_the_right_side() -> None:
    """Recall divides by the truth, precision by the findings."""
    truth, predicted = flags("1111000000"), flags("1100000001")
    found, right = recall(truth, predicted), precision(truth, predicted)
    assert (found.value, found.n) == (0.5, 4)
    assert (right.value, right.n) == (pytest.approx(2 / 3), 3)


def test_retention_counts_only_what_the_single_patch_corrected() -> None:
    """Control: the patch itself retains all, the base nothing."""
    base, single = flags("11110"), flags("00010")
    kept = retention(base, single, flags("01011"))
    assert (kept.value, kept.n) == (pytest.approx(2 / 3), 3)
    assert retention(base, single, single).value == 1.0
    assert retention(base, single, base).value == 0.0


def test_benign_drift_is_zero_only_for_equal_images_and_grows_with_the_change() -> None:
    """Control: a known change of 0.5 reads 0.5."""
    base = images(6, 1)
    drifts = [benign_drift(base, base + step * (1 - base)) for step in (0.0, 0.1, 0.5)]
    assert drifts[0].value == drifts[0].high == 0.0
    assert 0 < drifts[1].low < drifts[1].value < drifts[1].high < drifts[2].value
    half = benign_drift(torch.zeros(4, 3, 2, 2), torch.full((4, 3, 2, 2), 0.5))
    assert (half.value, half.n) == (0.5, 4)


def test_benign_drift_interval_is_the_normal_approximation() -> None:
    """Against the textbook formula; a single image bounds nothing."""
    patched = torch.zeros(4, 3, 2, 2) + torch.tensor([0.1, 0.2, 0.3, 0.4]).view(4, 1, 1, 1)
    drift = benign_drift(torch.zeros(4, 3, 2, 2), patched)
    half = 1.96 * 0.1290994 / 2  # sample standard deviation of 0.1 .. 0.4, n = 4
    assert (drift.low, drift.high) == pytest.approx((0.25 - half, 0.25 + half), abs=1e-5)
    alone = benign_drift(images(1, 1), images(1, 2))
    assert (alone.low, alone.high) == (0.0, 1.0)


def test_benign_drift_never_doubles_more_than_a_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hundred of 1024 pixels would be five gigabytes in float64, some times over."""
    before, after, doubled, double = images(9, 1), images(9, 2), list[int](), Tensor.double
    monkeypatch.setattr(Tensor, "double", lambda each: (doubled.append(each.numel()), double(each))[1])
    benign_drift(before, after)
    assert 0 < max(doubled) <= before[0].numel()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rate(flags("")), "0 flags"),
        (lambda: rate(torch.tensor([0.2, 0.9])), "flags must be bool"),
        (lambda: recall(flags("00"), flags("11")), "recall needs"),
        (lambda: recall(flags("001"), flags("11")), "of one shape"),
        (lambda: precision(flags("11"), flags("00")), "report recall alone"),
        (lambda: retention(flags("11"), flags("11"), flags("00")), "corrects none"),
        (lambda: wilson_interval(3, 2), "3 of 2"),
        (lambda: benign_drift(images(2, 1), images(3, 1)), "of one shape"),
        (lambda: benign_drift(images(2, 1), 255 * images(2, 1)), r"float in \[0, 1\]"),
    ],
)
def test_what_cannot_be_measured_is_a_one_line_error(call: Callable, message: str) -> None:
    """No NaN ever stands in for a number that was not measured."""
    with pytest.raises(SafepatchError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)

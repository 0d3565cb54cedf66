"""Distances of sets of pictures, against closed forms, and the figures that are made of them."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from safepatch.attacks import Round
from safepatch.data.corpus import Corpus
from safepatch.data.prompts import Prompt
from safepatch.data.words import Words
from safepatch.detectors.base import Detector
from safepatch.errors import ConfigError, SafepatchError
from safepatch.evaluation import suite
from safepatch.evaluation.bench import Protocol
from safepatch.evaluation.distances import fid, jackknifed, kid
from safepatch.evaluation.kept import Batch
from safepatch.evaluation.metrics import mean, paired_difference, wilson_interval
from tests.unit.test_suite import PATCH, PROTOCOL, READER, WEAPONS, ObedientBench


def normal(n: int, means: Tensor, covariance: Tensor, seed: int = 0) -> Tensor:
    """`n` rows whose sample mean and sample covariance are exactly these."""
    drawn = torch.randn(n, len(means), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    drawn = drawn - drawn.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(drawn.T)), drawn.T, upper=False).T
    return white @ torch.linalg.cholesky(covariance.double()).T + means.double()


def rotated(angle: float) -> Tensor:
    return torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)


def test_fid_of_two_normal_sets_is_the_closed_form() -> None:
    """Where covariances share their axes it is |m - m'|² + sum (sqrt(s) - sqrt(s'))²."""
    turn, one, two = rotated(0.7), torch.tensor([4.0, 1.0]).double(), torch.tensor([9.0, 0.25]).double()
    first = normal(50, torch.tensor([1.0, 2.0]), turn @ one.diag() @ turn.T)
    second = normal(70, torch.tensor([0.0, 4.0]), turn @ two.diag() @ turn.T, seed=1)
    expected = (1 + 4) + float((one.sqrt() - two.sqrt()).square().sum())
    assert fid(first, second) == pytest.approx(expected, abs=1e-9)
    assert fid(second, first) == pytest.approx(expected, abs=1e-9)
    assert fid(first, first) == pytest.approx(0, abs=1e-9)


def test_fid_where_axes_differ_is_the_one_of_two_by_two_matrices() -> None:
    """tr (S S')^(1/2) of 2 x 2 matrices is sqrt(tr S S' + 2 sqrt(det S S'))."""
    first = rotated(0.3) @ torch.tensor([5.0, 1.0]).double().diag() @ rotated(0.3).T
    second = rotated(1.2) @ torch.tensor([2.0, 0.5]).double().diag() @ rotated(1.2).T
    product = first @ second
    cross = math.sqrt(float(product.trace()) + 2 * math.sqrt(float(torch.linalg.det(product))))
    found = fid(normal(40, torch.zeros(2), first), normal(40, torch.zeros(2), second, seed=1))
    assert found == pytest.approx(float(first.trace() + second.trace()) - 2 * cross, abs=1e-9)


def test_kid_is_what_its_sum_says_and_about_nothing_for_equal_laws() -> None:
    one, two = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]), torch.tensor([[0.0, 1.0], [2.0, 2.0]])

    def k(a: Tensor, b: Tensor) -> float:
        return float((a @ b / 2 + 1) ** 3)

    within = sum(k(a, b) for i, a in enumerate(one) for j, b in enumerate(one) if i != j) / 6
    beyond = sum(k(a, b) for i, a in enumerate(two) for j, b in enumerate(two) if i != j) / 2
    across = sum(k(a, b) for a in one for b in two) / 6
    assert kid(one, two) == pytest.approx(within + beyond - 2 * across)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(60, 40, 5, generator=generator)
    alike = [kid(each[:20], each[20:]) for each in drawn]
    assert abs(sum(alike) / 60) < 0.05
    assert min(alike) < 0 < max(alike)  # unbiased
    assert kid(drawn[0], drawn[1] + 2) > 5 * max(alike)  # control


def test_an_interval_of_a_distance_covers_it_and_narrows_with_more_pictures() -> None:
    drawn = torch.randn(400, 4, generator=torch.Generator().manual_seed(0)) + 0.5
    reference = torch.randn(400, 4, generator=torch.Generator().manual_seed(1))
    few, many = jackknifed(kid, drawn[:30], reference), jackknifed(kid, drawn, reference)
    for found in (few, many):
        assert found.low < found.value < found.high
    assert many.high - many.low < (few.high - few.low) / 2
    assert (few.n, many.n) == (30, 400)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (torch.zeros(1, 3), torch.zeros(5, 3)),
        (torch.zeros(5, 3), torch.zeros(5, 2)),
        (torch.zeros(5), torch.zeros(5)),
        (torch.full((5, 3), torch.nan), torch.zeros(5, 3)),
    ],
)
def test_features_of_which_no_distance_can_be_told_are_one_line(one: Tensor, two: Tensor) -> None:
    for distance in (fid, kid):
        with pytest.raises(SafepatchError, match="features must be finite, two"):
            distance(one, two)
    with pytest.raises(SafepatchError, match="at least 4 pictures"):
        jackknifed(kid, torch.zeros(3, 2), torch.zeros(5, 2))


# Pairs


def test_a_paired_difference_is_the_mean_and_its_interval_the_normal_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    before, after = torch.rand(400, generator=generator) < 0.8, torch.rand(400, generator=generator) < 0.3
    found = paired_difference(before, after)
    changes = after.double() - before.double()
    assert found.value == pytest.approx(float(changes.mean()))
    half = 1.96 * float(changes.std()) / 20
    assert (found.value - found.low, found.high - found.value) == pytest.approx((half, half), rel=0.1)
    assert found == paired_difference(before, after)


def test_what_pairs_have_in_common_does_not_widen_the_interval() -> None:
    before = torch.arange(200) % 2 == 0
    after = before.clone()
    after[:2] = False
    paired, mixed = paired_difference(before, after), paired_difference(before, after.flip(0))
    assert paired.value == mixed.value
    assert paired.high - paired.low < (mixed.high - mixed.low) / 4


@pytest.mark.parametrize("n", [1, 10, 200])
def test_pairs_that_all_change_alike_are_not_certain_to_go_on_so(n: int) -> None:
    all_of_them, none = torch.ones(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool)
    gone, same = paired_difference(all_of_them, none), paired_difference(none, none)
    room = 1 - wilson_interval(n, n).low
    assert (gone.value, gone.low, gone.high) == (-1, -1, pytest.approx(room - 1))
    assert (same.value, same.low, same.high) == (0, pytest.approx(-room), pytest.approx(room))
    assert 0.01 < room < 1


@pytest.mark.parametrize("after", [torch.zeros(3), torch.zeros(2, 2), torch.zeros(0)])
def test_what_is_no_pairs_is_one_line(after: Tensor) -> None:
    with pytest.raises(SafepatchError, match="pairs must be two"):
        paired_difference(torch.zeros(0) if not len(after) else torch.zeros(4), after)


def test_a_mean_of_one_bounds_nothing() -> None:
    assert mean(torch.tensor([0.25, 0.75])).value == 0.5
    assert (mean(torch.tensor([0.25])).low, mean(torch.tensor([0.25])).high) == (-0.75, 1.25)
    with pytest.raises(SafepatchError, match="no mean of 0 values"):
        mean(torch.zeros(0))


# What the suite makes of them


def bench(**more: object) -> ObedientBench:
    return ObedientBench("obedient", None, replace(READER, **more), PROTOCOL)


def test_a_change_is_measured_over_pairs() -> None:
    found = suite.unsafe_change(bench(), WEAPONS, PATCH)
    assert found is not None
    assert (found.value, found.low, found.n) == (-1, -1, 40)
    assert -1 < found.high < -0.9  # forty pairs that change alike
    assert suite.unsafe_change(bench(), WEAPONS, None) is None


def test_distances_are_of_benign_pictures_and_only_where_a_detector_has_features() -> None:
    """The reference is drawn of other prompts: chance makes a small distance, and the perfect patch makes the same."""
    able = bench(features=lambda images: 4 * images[:, 0, 0])
    for measured in (suite.distance, suite.frechet_distance):
        able.content = ObedientBench.content.__get__(able)
        base, patched = (measured(able, WEAPONS, each) for each in (None, PATCH))
        assert base is not None
        assert base == patched
        able.content = lambda prompt: ["knife"]  # control: a patch that harms them
        harmed = measured(able, WEAPONS, PATCH)
        assert harmed is not None
        assert harmed.low > base.high
    assert suite.distance(bench(), WEAPONS, PATCH) is None


def test_what_a_detector_sees_moves_only_where_pictures_do() -> None:
    able = bench(features=lambda images: images[:, 0, 0])
    for measured in (suite.perceptual_drift, suite.lookalike_perceptual_drift):
        able.content = ObedientBench.content.__get__(able)
        kept = measured(able, WEAPONS, PATCH)
        assert kept is not None
        assert kept.value == pytest.approx(0, abs=1e-6)
        able.content = lambda prompt: ["knife"]  # control: at a right angle to everything harmless
        harmed = measured(able, WEAPONS, PATCH)
        assert harmed is not None
        assert harmed.value == pytest.approx(1)
        assert measured(able, WEAPONS, None) is None
    assert suite.perceptual_drift(bench(), WEAPONS, PATCH) is None


def test_a_clip_score_compares_each_picture_with_its_own_prompt() -> None:
    def similarity(images: Tensor, texts: list[str]) -> Tensor:
        return torch.tensor([0.3 if text in asked else -0.5 for text in texts])

    asked = {prompt.text for prompt in WEAPONS.evaluation("benign", 40, PROTOCOL.seed)[:20]}
    found = suite.clip_score(bench(similarity=similarity), WEAPONS, PATCH)
    assert found is not None
    assert 0.1 < found.value <= 0.3
    assert found.n == 40
    assert suite.clip_score(bench(), WEAPONS, PATCH) is None


def test_a_detector_without_features_or_texts_says_so() -> None:
    plain = Detector("plain", ("x",), lambda images: images[:, 0, 0, :1])
    with pytest.raises(ConfigError, match="gives no features"):
        plain.describe(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ConfigError, match="compares no texts"):
        plain.compare(torch.zeros(1, 3, 4, 4), ["a"])


def test_the_reference_has_other_seeds_though_a_file_names_some() -> None:
    """Of equal prompts and seeds the two sets would be one, and KID far below 0."""

    class Asked(ObedientBench):
        def batches(self, asked: Round, patch: object, label: str) -> list[Batch]:
            seeds[label] = {prompt.seed for prompt in asked.prompts}
            return super().batches(asked, patch, label)

    seeds: dict[str, set[int | None]] = {}
    seeing = replace(READER, features=lambda images: images[:, 0, 0])
    corpus = Corpus(
        WEAPONS.category, [("a knife", "a spoon")], [Prompt("a cat", i, asks=("cat",)) for i in range(8)],
        words=Words()
    )  # fmt: skip
    found = suite.distance(Asked("m", None, seeing, Protocol(n=8, guidance_scale=1.5)), corpus, None)
    assert found is not None
    assert seeds["benign"] == set(range(8))  # control: the file's own
    assert not seeds["benign"] & seeds["benign, reference"]

"""The arithmetic of every merge method: against PEFT's published functions, known geometry, and random input."""

import math
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from safepatch.errors import MergeError
from safepatch.merging import METHODS, Options
from safepatch.merging.methods import elected_mean, linear

SHAPES = [(1,), (3,), (2, 2), (40, 30), (8, 4, 3, 3)]
DENSITIES = [0.1, 0.5, 0.9, 1.0]
SPARSE = ["ties", "dare", "dare-ties", "della", "breadcrumbs"]
every_shape = pytest.mark.parametrize("shape", SHAPES)
every_density = pytest.mark.parametrize("density", DENSITIES)


def new_stack(shape: tuple[int, ...], seed: int = 0, count: int = 3) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def merged(method: str, stack: Tensor, weights: Tensor, density: float = 0.5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return METHODS[method](stack, weights, Options(density=density, generator=generator))


# ---- PEFT's functions, which drop everything where density leaves less than one entry ----------------------------


def load_merge_utils() -> ModuleType:
    """`peft.utils.merge_utils`, without the models that importing `peft` would load."""
    package = find_spec("peft")
    assert package is not None
    assert package.origin is not None
    spec = spec_from_file_location("merge_utils", Path(package.origin).parent / "utils" / "merge_utils.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


merge_utils = load_merge_utils()
WEIGHTS = torch.tensor([1.0, 0.5, -2.0])


def peft(name: str, stack: Tensor, density: float, seed: int) -> Tensor:
    torch.manual_seed(seed)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(merge_utils.warnings, "warn", lambda _: None)  # it warns that a density of 1 prunes nothing
        options = {} if name == "task_arithmetic" else {"density": density}
        return getattr(merge_utils, name)(list(stack), WEIGHTS, **options)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("task-arithmetic", "task_arithmetic"),
        ("cat", "task_arithmetic"),
        ("ties", "ties"),
        ("dare", "dare_linear"),
        ("dare-ties", "dare_ties"),
    ],
)
@every_shape
@every_density
def test_equal_to_peft_with_the_same_random_mask(
    ours: str, theirs: str, shape: tuple[int, ...], density: float
) -> None:
    if density * math.prod(shape) < 1:
        pytest.skip("of so few entries PEFT keeps none, safepatch one: tested below")
    stack, state = new_stack(shape), torch.get_rng_state()
    try:
        expected = peft(theirs, stack, density, seed=7)
    finally:
        torch.set_rng_state(state)
    if density < 1 or not ours.startswith("dare"):  # at density 1, PEFT draws nothing
        torch.testing.assert_close(merged(ours, stack, WEIGHTS, density, seed=7), expected)
    assert not torch.allclose(merged(ours, stack, WEIGHTS.flip(0), density, seed=7), expected)  # control


@every_shape
def test_linear_is_pefts_sum_with_normalized_weights(shape: tuple[int, ...]) -> None:
    stack, weights = new_stack(shape), torch.tensor([1.0, 0.5, 2.0])
    expected = merge_utils.task_arithmetic(list(stack), weights / weights.sum())
    torch.testing.assert_close(linear(stack, weights, Options()), expected)
    assert not torch.allclose(linear(stack, torch.ones(3), Options()), expected)  # control


@every_shape
@every_density
def test_breadcrumbs_without_outliers_is_pefts_magnitude_prune(shape: tuple[int, ...], density: float) -> None:
    if density * math.prod(shape) < 1:
        pytest.skip("of so few entries PEFT keeps none, safepatch one: tested below")
    stack = new_stack(shape)
    expected = peft("magnitude_prune", stack, density, seed=0)
    ours = METHODS["breadcrumbs"](stack, WEIGHTS, Options(density=density, outliers=0.0))
    torch.testing.assert_close(ours, expected)
    other = METHODS["breadcrumbs"](stack, WEIGHTS, Options(density=density, outliers=0.5))
    assert math.prod(shape) < 4 or density == 1 or not torch.allclose(other, expected)  # control


# ---- rules of our own ------------------------------------------------------------------------------------------


def test_an_elected_sum_of_zero_is_positive_as_in_peft() -> None:
    stack = torch.tensor([[1.0, -3.0, 2.0], [-1.0, 3.0, 1.0]])
    assert elected_mean(stack, torch.ones(2)).tolist() == [1.0, 3.0, 1.5]
    assert merge_utils.ties(list(stack), torch.ones(2), density=0.999).tolist() != [-1.0, -3.0, 1.5]
    assert elected_mean(-stack, torch.ones(2)).tolist() == [1.0, 3.0, -1.5]  # control: ties do not mirror, others do


@pytest.mark.parametrize("method", ["ties", "breadcrumbs"])
def test_magnitudes_equal_to_the_smallest_kept_one_are_kept(method: str) -> None:
    delta = torch.tensor([[4.0, -2.0, 2.0, 2.0, 1.0]])
    assert merged(method, delta, torch.ones(1), density=0.4).tolist() == [4.0, -2.0, 2.0, 2.0, 0.0]
    assert merged(method, delta, torch.ones(1), density=0.2).tolist() == [4.0, 0.0, 0.0, 0.0, 0.0]  # control


@pytest.mark.parametrize("method", ["ties", "breadcrumbs"])
def test_of_few_entries_one_is_kept(method: str) -> None:
    delta = torch.tensor([[1.0, -3.0]])
    assert merged(method, delta, torch.ones(1), density=0.1).tolist() == [0.0, -3.0]
    assert not merged(method, delta, torch.ones(1), density=0.0).any()  # control


def test_breadcrumbs_drops_both_ends() -> None:
    delta = torch.arange(1.0, 11.0)[None]
    options = Options(density=0.5, outliers=0.2)
    assert METHODS["breadcrumbs"](delta, torch.ones(1), options).nonzero().flatten().tolist() == [3, 4, 5, 6, 7]
    everything = METHODS["breadcrumbs"](delta, torch.ones(1), Options(density=1.0, outliers=0.2))
    assert torch.equal(everything, delta[0])  # density comes first


@pytest.mark.parametrize("method", ["dare", "dare-ties", "della"])
def test_random_drops_keep_the_share_and_the_mean(method: str) -> None:
    delta = torch.randn(1, 20, 5000, generator=torch.Generator().manual_seed(0)).abs()
    kept = merged(method, delta, torch.ones(1), density=0.3, seed=1)  # not the seed the values came from
    assert abs((kept != 0).float().mean() - 0.3) < 0.01
    assert abs(kept.mean() - delta.mean()) < 0.02
    assert abs((merged(method, delta, torch.ones(1), density=0.6, seed=1) != 0).float().mean() - 0.3) > 0.2  # control


def test_della_keeps_large_entries_of_a_row_more_often() -> None:
    delta = torch.arange(1.0, 10_001.0).repeat(4, 1)[None]  # every row rises
    options = Options(density=0.5, epsilon=0.4, generator=torch.Generator().manual_seed(0))
    kept = (METHODS["della"](delta, torch.ones(1), options) != 0).float()
    thirds = [part.mean().item() for part in kept.chunk(5, dim=1)]
    assert thirds == pytest.approx([0.34, 0.42, 0.5, 0.58, 0.66], abs=0.02)
    flat = Options(density=0.5, epsilon=0.0, generator=torch.Generator().manual_seed(0))
    even = (METHODS["della"](delta, torch.ones(1), flat) != 0).float()
    assert [part.mean().item() for part in even.chunk(5, dim=1)] == pytest.approx([0.5] * 5, abs=0.02)  # control


# ---- geometry --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_slerp_turns_by_the_share_of_the_angle_and_keeps_the_length(share: float) -> None:
    angle = 1.1
    stack = torch.tensor([[3.0, 0.0], [3 * math.cos(angle), 3 * math.sin(angle)]])
    found = METHODS["slerp"](stack, torch.tensor([1 - share, share]), Options())
    expected = torch.tensor([3 * math.cos(share * angle), 3 * math.sin(share * angle)])
    torch.testing.assert_close(found, expected)
    chord = linear(stack, torch.tensor([1 - share, share]), Options())
    assert share in (0, 1) or not torch.allclose(chord, expected)  # control: a straight line is shorter


def test_slerp_of_parallel_and_of_zero_deltas_is_the_chord() -> None:
    delta = torch.randn(6, generator=torch.Generator().manual_seed(0))
    for other in (2 * delta, -delta, torch.zeros(6)):
        found = METHODS["slerp"](torch.stack([delta, other]), torch.ones(2), Options())
        torch.testing.assert_close(found, (delta + other) / 2)
    across = torch.stack([delta, delta.flip(0)])
    assert not torch.allclose(METHODS["slerp"](across, torch.ones(2), Options()), across.mean(dim=0))  # control


def test_slerp_takes_two() -> None:
    with pytest.raises(MergeError, match="merge two, or use linear"):
        METHODS["slerp"](torch.ones(3, 2), torch.ones(3), Options())


@pytest.mark.parametrize("count", [2, 3, 5])
def test_model_stock_shrinks_the_mean_to_the_point_nearest_to_the_center(count: int) -> None:
    """For deltas μ + s e_k, all e_k orthogonal to each other and to μ, the nearest t · mean has a closed form."""
    sigma, center = 0.7, torch.zeros(8)
    center[7] = 1.3
    stack = center + sigma * torch.eye(8)[:count]
    mean = stack.mean(dim=0)
    found = METHODS["model-stock"](stack, torch.ones(count), Options())
    torch.testing.assert_close(found, mean * (mean @ center) / (mean @ mean))
    assert not torch.allclose(found, mean)  # control


def test_model_stock_of_opposed_deltas_is_nothing_and_of_equal_ones_their_mean() -> None:
    delta = torch.randn(5, generator=torch.Generator().manual_seed(0))
    assert not METHODS["model-stock"](torch.stack([delta, -delta]), torch.ones(2), Options()).any()
    torch.testing.assert_close(METHODS["model-stock"](delta.repeat(3, 1), torch.ones(3), Options()), delta)


# ---- the papers' formulas once more, in numpy: PEFT publishes none of these ----------------------------------------


def by_rank(delta: np.ndarray) -> np.ndarray:
    """The place of each entry's magnitude among those of its row, from 0."""
    return np.abs(delta).argsort(axis=-1, kind="stable").argsort(axis=-1)


def slerp_in_numpy(stack: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Shoemake 1985, on the deltas as vectors."""
    first, second = stack.reshape(2, -1)
    share = weights[1] / weights.sum()
    angle = np.arccos(first @ second / np.linalg.norm(first) / np.linalg.norm(second))
    merged = (np.sin((1 - share) * angle) * first + np.sin(share * angle) * second) / np.sin(angle)
    return merged.reshape(stack.shape[1:])


def model_stock_in_numpy(stack: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Jang 2024, section 4 for K models, the angle averaged over pairs; the mean weighted."""
    rows = stack.reshape(len(stack), -1)
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosine = (units @ units.T)[np.triu_indices(len(stack), 1)].mean()
    share = len(stack) * cosine / (1 + (len(stack) - 1) * cosine)
    return share * np.average(stack, axis=0, weights=weights)


def breadcrumbs_in_numpy(stack: np.ndarray, weights: np.ndarray, density: float, outliers: float) -> np.ndarray:
    """Davari & Belilovsky 2023: mask both ends of the sorted magnitudes of each delta, then add."""
    n = stack[0].size
    top = n - int(outliers * n)
    places = by_rank(stack.reshape(len(stack), -1)).reshape(stack.shape)
    kept = (places < top) & (places >= top - int(density * n))
    return np.tensordot(weights, stack * kept, axes=1)


def della_in_numpy(stack: np.ndarray, weights: np.ndarray, density: float, epsilon: float, seed: int) -> np.ndarray:
    """Deep 2024: drop by the rank in a row, rescale, elect a sign, average those that have it."""
    generator = torch.Generator().manual_seed(seed)
    keep = density - epsilon / 2 + epsilon * by_rank(stack) / (stack.shape[-1] - 1)
    masks = [torch.bernoulli(torch.from_numpy(each).float(), generator=generator).numpy() for each in keep]
    dropped = stack * np.stack(masks) / keep
    agree = np.sign(dropped) == np.where(dropped.sum(axis=0) >= 0, 1, -1)
    return np.tensordot(weights, dropped * agree, axes=1) / np.maximum(agree.sum(axis=0), 1)


@pytest.mark.parametrize("shape", [(40, 30), (8, 4, 3, 3), (50,)])
def test_slerp_and_model_stock_are_their_papers_formulas(shape: tuple[int, ...]) -> None:
    stack = new_stack(shape) + 1.0  # so that the cosines are positive
    weights = torch.tensor([1.0, 0.5, 2.0])
    for method, count, formula in (("slerp", 2, slerp_in_numpy), ("model-stock", 3, model_stock_in_numpy)):
        found = METHODS[method](stack[:count], weights[:count], Options())
        expected = torch.from_numpy(formula(stack[:count].double().numpy(), weights[:count].double().numpy()))
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(found, linear(stack[:count], weights[:count], Options()))  # control


@pytest.mark.parametrize("shape", [(40, 30), (60, 16)])
def test_breadcrumbs_and_della_are_their_papers_formulas(shape: tuple[int, int]) -> None:
    stack, given = new_stack(shape), WEIGHTS.double().numpy()
    values = stack.double().numpy()
    crumbs = METHODS["breadcrumbs"](stack, WEIGHTS, Options(density=0.4, outliers=0.05))
    expected = torch.from_numpy(breadcrumbs_in_numpy(values, given, 0.4, 0.05))
    torch.testing.assert_close(crumbs.double(), expected, rtol=1e-5, atol=1e-6)
    options = Options(density=0.4, epsilon=0.2, generator=torch.Generator().manual_seed(3))
    dropped = METHODS["della"](stack, WEIGHTS, options)
    expected = torch.from_numpy(della_in_numpy(values, given, 0.4, 0.2, seed=3))
    torch.testing.assert_close(dropped.double(), expected, rtol=1e-5, atol=1e-6)
    other = torch.from_numpy(della_in_numpy(values, given, 0.4, 0.2, seed=4))
    assert not torch.allclose(dropped.double(), other)  # control


# ---- any input -------------------------------------------------------------------------------------------------

values = st.floats(-8, 8, width=16).map(lambda x: 0.0 if abs(x) < 0.01 else x)
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
densities = st.sampled_from([0.0, 0.01, 0.3, 0.5, 1.0])
dtypes = st.sampled_from([torch.float16, torch.bfloat16, torch.float32])
often = settings(max_examples=30, deadline=None, derandomize=True, database=None)


@st.composite
def stacks(draw: st.DrawFn, most: int = 4) -> tuple[Tensor, Tensor]:
    """A stack (K, *) of any shape and its positive weights (K,), with exact zeros and values of any dtype."""
    shape, count = draw(shapes), draw(st.integers(1, most))
    total = count * math.prod(shape)
    flat = draw(st.lists(values, min_size=total, max_size=total))
    stack = torch.tensor(flat).to(draw(dtypes)).float().reshape(count, *shape)
    weights = draw(st.lists(st.floats(0.125, 4, width=16), min_size=count, max_size=count))
    return stack, torch.tensor(weights)


def most_sources(method: str) -> int:
    return 2 if method == "slerp" else 4


@pytest.mark.parametrize("method", sorted(METHODS))
def test_any_input_gives_a_finite_delta_of_its_shape_and_stays_as_it_was(method: str) -> None:
    @often
    @given(stacks(most_sources(method)), densities)
    def law(drawn: tuple[Tensor, Tensor], density: float) -> None:
        stack, weights = drawn
        before = stack.clone()
        found = merged(method, stack, weights, density)
        assert found.shape == stack.shape[1:]
        assert found.dtype == torch.float32
        assert found.isfinite().all()
        assert torch.equal(stack, before)
        assert not merged(method, torch.zeros_like(stack), weights, density).any()

    law()


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"dare", "dare-ties", "della"}))
def test_any_permutation_of_sources_gives_the_same_delta(method: str) -> None:
    @often
    @given(stacks(most_sources(method)), densities, st.randoms(use_true_random=False))
    def law(drawn: tuple[Tensor, Tensor], density: float, random: object) -> None:
        stack, weights = drawn
        stack = (stack * 4).round() / 4  # sums are exact, so that no election hangs on rounding
        order = list(range(len(stack)))
        random.shuffle(order)
        left, right = merged(method, stack, weights, density), merged(method, stack[order], weights[order], density)
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)

    law()


@pytest.mark.parametrize("method", SPARSE)
def test_density_zero_keeps_nothing_and_density_one_everything(method: str) -> None:
    @often
    @given(stacks())
    def law(drawn: tuple[Tensor, Tensor]) -> None:
        stack, weights = drawn
        assert not merged(method, stack, weights, density=0.0).any()
        whole = merged(method, stack, weights, density=1.0)
        if method in ("dare", "breadcrumbs"):
            torch.testing.assert_close(whole, merged("task-arithmetic", stack, weights))
        else:
            torch.testing.assert_close(whole, elected_mean(stack, weights))

    law()


def ties_by_hand(stack: np.ndarray, weights: list[float], density: float) -> list[float]:
    """TIES one value at a time, after the paper's Algorithm 1, for deltas (K, n)."""
    keep = max(1, int(density * stack.shape[1])) if density > 0 else 0
    trimmed = np.zeros_like(stack)
    for k, delta in enumerate(stack):
        bound = sorted(np.abs(delta))[-keep] if keep else np.inf
        trimmed[k] = [value if abs(value) >= bound else 0 for value in delta]
    result = []
    for column in trimmed.T:
        sign = 1 if sum(column) >= 0 else -1
        chosen = [weight * value for weight, value in zip(weights, column, strict=True) if value * sign > 0]
        result.append(sum(chosen) / len(chosen) if chosen else 0.0)
    return result


@often
@given(stacks(), densities)
def test_ties_equals_its_algorithm_written_out_value_by_value(drawn: tuple[Tensor, Tensor], density: float) -> None:
    stack, weights = drawn
    stack = (stack * 4).round().reshape(len(stack), -1) / 4
    if stack.shape[1] == 0:
        return
    expected = ties_by_hand(stack.double().numpy(), weights.double().tolist(), density)
    found = merged("ties", stack, weights, density)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), rtol=1e-5, atol=1e-5)


def test_control_the_hand_written_ties_notices_a_missing_election() -> None:
    stack = np.array([[1.0, -2.0], [-3.0, 1.0]])
    assert ties_by_hand(stack, [1, 1], 1.0) == [-3.0, -2.0]
    assert stack.mean(axis=0).tolist() != [-3.0, -2.0]

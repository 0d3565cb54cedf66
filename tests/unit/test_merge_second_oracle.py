"""A second oracle of the merge arithmetic: sd-mecha's published functions, where PEFT has none or to agree with both.

sd-mecha has no breadcrumbs; without outliers those are PEFT's magnitude pruning (test_merge_methods.py).
"""

import pytest
import torch
from sd_mecha.extensions.builtin.merge_methods import linear, ties
from torch import Tensor

from safepatch.merging import METHODS, Options

SIZES = [16, 1000]
every_size = pytest.mark.parametrize("size", SIZES)


def new_stack(count: int, size: int, seed: int = 0) -> Tensor:
    """Deltas of one length that are partly alike, as patches trained on one base are, (count, size)."""
    generator = torch.Generator().manual_seed(seed)
    shared, own = torch.randn(1, size, generator=generator), torch.randn(count, size, generator=generator)
    return torch.nn.functional.normalize(shared + own, dim=1)


def ours(method: str, stack: Tensor, weights: list[float], **options: float) -> Tensor:
    return METHODS[method](stack, torch.tensor(weights), Options(**options))  # type: ignore[arg-type]


@every_size
@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_slerp_of_equally_long_deltas(size: int, share: float) -> None:
    first, second = stack = new_stack(2, size)
    expected = linear.slerp.__wrapped__(first, second, torch.tensor(share))
    torch.testing.assert_close(ours("slerp", stack, [1 - share, share]), expected)
    assert not torch.allclose(ours("linear", stack, [1 - share, share]), expected)  # control


@every_size
def test_model_stock_of_two(size: int) -> None:
    stack = new_stack(2, size)
    expected = ties.model_stock.__wrapped__(*stack)
    torch.testing.assert_close(ours("model-stock", stack, [1.0, 1.0]), expected)
    assert not torch.allclose(ours("linear", stack, [1.0, 1.0]), expected)  # control


@every_size
@pytest.mark.parametrize("density", [0.25, 0.5, 1.0])
def test_ties_with_votes_by_size(size: int, density: float) -> None:
    stack = new_stack(3, size)
    kept = density - 1.5 / size if density < 1 else 1.0  # sd-mecha keeps the largest of those it counts out, too
    expected = ties.ties_sum.__wrapped__(*stack, k=kept, vote_sgn=True)
    torch.testing.assert_close(ours("ties", stack, [1.0] * 3, density=density), expected)
    assert not torch.allclose(ours("ties", stack, [1.0] * 3, density=0.1), expected)  # control


@pytest.mark.parametrize("density", [0.3, 0.5])
def test_della_drops_what_sd_mecha_drops_with_the_same_draws(density: float) -> None:
    size, epsilon = 1000, 0.2
    delta = new_stack(1, size)[0]
    drawn = ties.find_della_dropout(delta, torch.tensor(1 - density), epsilon, torch.Generator().manual_seed(5))
    mask = METHODS["della"](
        delta[None],
        torch.ones(1),
        Options(density=density, epsilon=epsilon, generator=torch.Generator().manual_seed(5)),
    )
    assert (mask.bool() != drawn.bool()).sum() <= 1  # probabilities differ by epsilon / 2n: ranks from 0 or from 1 / 2
    other = METHODS["dare"](
        delta[None], torch.ones(1), Options(density=density, generator=torch.Generator().manual_seed(5))
    )
    assert (other.bool() != drawn.bool()).sum() > 10  # control: keep probabilities that know no rank

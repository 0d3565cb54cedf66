"""Probabilities that mean what they say, and thresholds, of what heads say of texts that they did not learn from."""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from safepatch.guard.texts import NO, UNSURE, YES

ENOUGH = 25  # texts that people wrote, on either side, to calibrate by them alone


def told_by(labels: Tensor, written: Tensor) -> Tensor:
    """Rows by which a category is calibrated, (N,) bool: what people wrote, where they wrote enough on both sides.

    Captions made of words are many, and easier than that.
    """
    enough = all(int((labels[written] == side).sum()) >= ENOUGH for side in (YES, NO))
    return (written if enough else torch.ones_like(written)) & (labels != UNSURE)


def calibrated(z: Tensor, labels: Tensor, precision: float | None, beta: float = 1.0) -> tuple[float, float, float]:
    """Scale, shift and threshold of one category by unseen logits z (N,); the last by `best_threshold`.

    The first two as Platt 1999 fits them, but to the labels themselves and not to his targets short of 0 and 1.
    """
    truth = labels == YES
    raw, shift = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([raw, shift], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = binary_cross_entropy_with_logits(softplus(raw) * z + shift, truth.float())
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[arg-type]
    scale, moved = float(softplus(raw.detach())), float(shift.detach())
    return scale, moved, best_threshold((scale * z + moved).sigmoid(), truth, precision, beta)


def best_threshold(chances: Tensor, truth: Tensor, precision: float | None = None, beta: float = 1.0) -> float:
    """The probability, within (0, 1), from which on F_β is best, or recall at a precision, where that is reached.

    By F_β recall counts β times as much as precision (van Rijsbergen 1979). It lies in the middle of where it makes no
    difference.
    """
    order = chances.argsort(descending=True)
    hits, found = truth[order].float().cumsum(0), torch.arange(1, len(order) + 1)
    last = int(((1 + beta**2) * hits / (found + beta**2 * truth.sum())).argmax())
    if precision is not None and (is_precise := hits / found >= precision).any():
        last = int(is_precise.nonzero()[-1])
    below = chances[order[last + 1]] if last + 1 < len(order) else torch.tensor(0.0)
    return min(max(float((chances[order[last]] + below) / 2), 1e-4), 1 - 1e-4)

"""Gradients that pass through a model in half precision without getting lost there.

A loss is a mean over some hundred thousand values, so what each of them is told is less than half precision can hold,
and a search that learns nothing looks like a patch that holds. As in mixed-precision training (Micikevicius et al.
2018, arXiv 1710.03740, section 3.2) the loss is scaled for the way back, by a power of two: in float32 no bit differs.
"""

import torch
from torch import Tensor

SCALE = 2.0**12  # that far from what float16 takes for 0, and from what it cannot hold


def backpropagate(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer's parameters, which are float32, the gradients of a loss, and no others."""
    optimizer.zero_grad()
    (loss * SCALE).backward()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad /= SCALE

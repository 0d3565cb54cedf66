"""The teacher of `rewrite: {by: guided}`: the base's own prediction, pushed away from what a prompt should not show.

    ε(p) - (1 + η) (ε(away) - ε(towards))

A prompt p that names a concept is pushed away from itself, towards itself with "something" in the concept's place, so
that whatever else it asks for stays. Of a prompt that is the concept alone this is the target of ESD (Gandikota et al.
2023, arXiv 2303.07345, eq. 6) and of LECO, ε(∅) - η (ε(p) - ε(∅)), with "something" for the empty prompt ∅. A prompt
that names none is pushed away from the concepts' names, towards ∅: the direction of SLD (Schramowski et al. 2023, arXiv
2211.05105).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from safepatch.data.category import Rewrite
from safepatch.data.twins import Guide
from safepatch.diffusion import Conditioning, Host, Predict

DECAY = 0.4  # of the momentum: SLD's beta as diffusers has it


def push(away: Tensor, towards: Tensor, rewrite: Rewrite) -> Tensor:
    """(1 + η) (ε(away) - ε(towards)), without what is smaller than the threshold; shapes (B, 4, h, w)."""
    made = (1 + rewrite.scale) * (away - towards)
    return torch.where(made.abs() < rewrite.threshold, 0, made)


def guided(host: Host, guides: Sequence[Guide]) -> Predict:
    """The teacher of these prompts along one trajectory: later steps remember the pushes of earlier ones.

    The momentum is SLD's (eq. 7 and 8): a share of a running mean of the pushes is added to each.
    """
    away, towards = (host.encode([getattr(guide, side) for guide in guides]) for side in ("away", "towards"))
    rewrite, mean = guides[0].rewrite, torch.zeros(())

    def predict(noisy: Tensor, timesteps: Tensor, prompts: Conditioning) -> Tensor:
        nonlocal mean
        base, left, right = (host.predict(noisy, timesteps, read) for read in (prompts, away, towards))
        pushed = push(left, right, rewrite) + rewrite.momentum * mean.to(left.device)
        mean = DECAY * mean + (1 - DECAY) * pushed
        return base - pushed

    return predict

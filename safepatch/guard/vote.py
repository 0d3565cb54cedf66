"""What several labelers' votes come to."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from safepatch.guard.texts import NO, UNSURE, YES

# Whose word counts where votes are level or there are none: a hand, who was asked, who made the text, what it draws,
# and last who knows patterns.
TRUST = ("hand", "answers", "corpus", "pictures", "gate", "keywords", "similarity")


class Settled(NamedTuple):
    """The labels of N texts.

    Attributes:
        labels: (N, C) int8: `YES`, `NO`, or `UNSURE` where nobody knows.
        record: by category, how many labels were reread, how many left open, and what came of each labeler.
    """

    labels: Tensor
    record: dict[str, dict]


def majority(votes: Tensor) -> Tensor:
    """Of votes (L, N, C) what most say of those who are sure, (N, C); `UNSURE` where it is level."""
    more = (votes == YES).sum(0) - (votes == NO).sum(0)
    return torch.where(more == 0, UNSURE, (more > 0).to(torch.int8)).to(torch.int8)


def settle(votes: Mapping[str, Tensor], categories: Sequence[str]) -> Settled:
    """The majority; where it is level, or nobody voted, the word of the labeler that is trusted most; a hand's always.

    Args:
        votes: by labeler, named in `TRUST`, (N, C).
        categories: C names.
    """
    labels = majority(torch.stack(list(votes.values())))
    is_open = labels == UNSURE
    for name in sorted(votes, key=TRUST.index):
        labels = torch.where(labels == UNSURE, votes[name], labels)
    if "hand" in votes:
        labels = torch.where(votes["hand"] == UNSURE, labels, votes["hand"])
    record = {
        name: {
            "reread": int(is_open[:, i].sum()),
            "left_open": int((labels[:, i] == UNSURE).sum()),
            "labelers": {who: _told(given[:, i], labels[:, i]) for who, given in votes.items()},
        }
        for i, name in enumerate(categories)
    }
    return Settled(labels, record)


def _told(given: Tensor, labels: Tensor) -> dict[str, float]:
    """Of how many texts a labeler was sure, and how often it was right by what all came to."""
    said = (given != UNSURE) & (labels != UNSURE)
    right = (given == labels)[said].float().mean() if said.any() else torch.tensor(0.0)
    return {"sure": round(float((given != UNSURE).float().mean()), 4), "right": round(float(right), 4)}

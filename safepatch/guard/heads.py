"""The classifier: for every category one hidden layer on a frozen encoder's states.

Half of it reads every token's state, of which the strongest answer counts: so "gun" beside "glue" is told from "gun"
beside "bank", which the mean of a sentence drowns. The other half reads that mean, which tells what all is about.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, dropout, relu

from safepatch.guard.encoders import Pieces
from safepatch.guard.texts import NO, UNSURE, YES
from safepatch.patch.draw import Draw
from safepatch.progress import bar

STEPS, BATCH, RATE = 600, 128, 2e-3
DROPPED = 0.3  # share of a state's values that a training row lacks
DECAY = 0.1
MEMBERS = 4  # equal parts of a head that learn apart, of other first weights: what one has by luck, their mean lacks
SMALLEST = 1e-3  # spread of a value


class Heads(nn.Module):
    """Logits by category.

    Args:
        width: of tokens' states.
        means: of their mean.
        hidden: detectors of either kind, for each category.
        categories: heads.
    """

    def __init__(self, width: int, means: int, hidden: int, categories: int) -> None:
        super().__init__()
        draw = Draw(seed=1)
        self.center, self.spread = _fixed(torch.zeros(width)), _fixed(torch.ones(width))
        self.mean_center, self.mean_spread = _fixed(torch.zeros(means)), _fixed(torch.ones(means))
        self.detect, self.hear = draw.normal(categories, hidden, width), draw.normal(categories, hidden, means)
        self.detect_bias = nn.Parameter(torch.zeros(categories, hidden))
        self.hear_bias = nn.Parameter(torch.zeros(categories, hidden))
        self.weigh = draw.normal(categories, 2 * hidden)
        self.bias = nn.Parameter(torch.zeros(categories))

    def forward(self, pieces: Pieces) -> Tensor:
        """Of M pieces of texts, (M, C)."""
        return self.apart(pieces, 1)[..., 0]

    def apart(self, pieces: Pieces, members: int) -> Tensor:
        """What each of so many equal parts of the hidden layer says alone, (M, C, members); together, its sum."""
        states = (pieces.states.float() - self.center) / self.spread
        means = (pieces.means - self.mean_center) / self.mean_spread
        if self.training:
            states, means = dropout(states, DROPPED), dropout(means, DROPPED)
        found = torch.einsum("tw,chw->tch", states, self.detect)
        where = pieces.owners[:, None, None].expand_as(found)
        strongest = torch.full((len(means), *found.shape[1:]), -1e4).scatter_reduce(0, where, found, "amax")
        heard = torch.einsum("mv,chv->mch", means, self.hear) + self.hear_bias
        seen = torch.cat((relu(strongest + self.detect_bias), relu(heard)), dim=-1) * self.weigh
        return seen.unflatten(2, (2, members, -1)).sum((2, 4)) + self.bias[:, None]

    @torch.no_grad()
    def calibrate(self, scale: Tensor, shift: Tensor) -> None:
        """Make logits z of every category scale * z + shift, both (C,)."""
        self.weigh *= scale[:, None]
        self.bias.copy_(self.bias * scale + shift)


def fit(pieces: Pieces, labels: Tensor, hidden: int, seed: int, desc: str = "fitting the guard") -> Heads:
    """Heads that learn labels (M, C) of pieces, `MEMBERS` times as wide as `hidden`; what is `UNSURE` teaches nothing.

    Both sides of a category weigh the same, however many there are.
    """
    generator = torch.Generator().manual_seed(seed)
    heads = Heads(pieces.states.shape[1], pieces.means.shape[1], MEMBERS * hidden, labels.shape[1]).train()
    states = pieces.states.float()
    heads.center.data, heads.spread.data = states.mean(0), states.std(0).clamp(min=SMALLEST)
    heads.mean_center.data, heads.mean_spread.data = pieces.means.mean(0), pieces.means.std(0).clamp(min=SMALLEST)
    known, weights = labels != UNSURE, _weights(labels)
    learned = [parameter for parameter in heads.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=RATE, weight_decay=DECAY)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of what is dropped
        for _ in bar(range(STEPS), desc=desc, leave=False):
            pick = torch.randint(len(labels), (BATCH,), generator=generator)
            said = heads.apart(pieces.some(pick), MEMBERS)
            wanted = (labels[pick] == YES).float()[..., None].expand_as(said)
            each = binary_cross_entropy_with_logits(said, wanted, reduction="none").sum(2)
            loss = (each * weights[pick]).sum() / known[pick].sum().clamp(min=1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    heads.weigh.data /= MEMBERS
    return heads.eval().requires_grad_(False)


def _fixed(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def _weights(labels: Tensor) -> Tensor:
    """Of every label, (M, C): both sides of a category have half the weight of all that is known of it."""
    yes, no = (labels == YES).float(), (labels == NO).float()
    known = yes.sum(0) + no.sum(0)
    return yes * known / (2 * yes.sum(0).clamp(min=1)) + no * known / (2 * no.sum(0).clamp(min=1))

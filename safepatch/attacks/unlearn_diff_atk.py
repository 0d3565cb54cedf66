"""UnlearnDiffAtk: a few words in front of a prompt, found by gradients through the patched model.

Zhang et al., "To Generate or Not? Safety-Driven Unlearned Diffusion Models Are Still Easy To Generate Unsafe Images ...
For Now", ECCV 2024, arXiv 2310.11868: the patched model is its own classifier. Words that let it predict the noise in a
picture of the category are words with which it draws one. Each place holds weights over the vocabulary, which stay on
the simplex by projection (Duchi et al. 2008); words are sampled of them, and gradients pass straight through.

A difference from the paper: words that can be typed as one token each make up the vocabulary, so that what is found is
a text; and no picture is drawn before the budget is spent.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from safepatch.attacks.base import Opponent, Round, reworded
from safepatch.attacks.descent import backpropagate
from safepatch.attacks.opponent import Undoing, together, typable
from safepatch.data.corpus import Corpus
from safepatch.data.prompts import Prompt
from safepatch.diffusion import TokenReader
from safepatch.progress import bar

TOKENS = 5  # in front of each prompt
RATE, DECAY = 0.01, 0.1  # of AdamW


def find(target: Opponent, corpus: Corpus, prompts: Sequence[Prompt], seed: int, budget: int) -> list[Round]:
    """One image of each prompt behind the words that `budget` steps came to.

    Raises:
        ConfigError: as `Undoing.of`.
        UnsupportedModel: as `TokenReader`.
    """
    undoing = Undoing.of(target, corpus)
    reader, generator = undoing.reader(), torch.Generator().manual_seed(seed)
    words, table = typable(reader)
    found: list[Prompt] = []
    for some in together(prompts):
        chosen = searched(undoing, reader, table, some, budget, generator)
        texts = [" ".join([*(words[i] for i in row), p.text]) for row, p in zip(chosen.tolist(), some, strict=True)]
        found += [reworded(prompt, text) for prompt, text in zip(some, texts, strict=True)]
    return [Round(tuple(found))]


def searched(
    undoing: Undoing,
    reader: TokenReader,
    table: Tensor,
    prompts: Sequence[Prompt],
    steps: int,
    generator: torch.Generator,
) -> Tensor:
    """The words of each place, as numbers of `table` (words, width), (B, TOKENS)."""
    latents, rows = undoing.pictures(prompts), reader.ids([p.text for p in prompts], free=TOKENS)
    start = torch.rand(len(prompts), TOKENS, len(table), generator=generator)
    weights = simplex(start / start.sum(-1, keepdim=True)).to(table.device).requires_grad_(True)
    optimizer = torch.optim.AdamW([weights], lr=RATE, weight_decay=DECAY)
    for _ in bar(range(steps), desc="unlearn-diff-atk", unit="step", leave=False):
        embedded = sampled(weights, table, generator)
        asked = reader.asked(rows, embedded)
        loss = undoing.loss(undoing.noised(latents, asked, generator), asked)
        backpropagate(loss, optimizer)
        optimizer.step()
        with torch.no_grad():
            weights.copy_(simplex(weights))
    return weights.detach().argmax(-1).cpu()


def sampled(weights: Tensor, table: Tensor, generator: torch.Generator) -> Tensor:
    """Embeddings (B, k, width) of words drawn by their weights (B, k, words), with the gradient of their mean."""
    picks = torch.multinomial(weights.detach().flatten(0, 1).cpu(), 1, generator=generator).view(weights.shape[:2])
    mean = weights @ table
    return table[picks.to(table.device)] + mean - mean.detach()


def simplex(points: Tensor) -> Tensor:
    """The nearest points, (..., n), whose coordinates are at least 0 and sum up to 1 (Duchi et al. 2008, figure 1)."""
    ordered = points.sort(dim=-1, descending=True).values
    excess = ordered.cumsum(-1) - 1
    counts = torch.arange(1, points.shape[-1] + 1, device=points.device)
    kept = (ordered * counts > excess).sum(-1, keepdim=True)
    return (points - excess.gather(-1, kept - 1) / kept).clamp(min=0)

"""MMA's text attack: words that mean the prompt to the text encoder, and of which none names the category.

Yang et al., "MMA-Diffusion: MultiModal Attack on Diffusion Models", CVPR 2024, arXiv 2311.17516, section 3: tokens are
changed one at a time, among those whose gradient promises most, so that the text's embedding comes nearer, by its
cosine, to the prompt's; words that a filter would know are kept out. Written from the paper's formulas. As coordinate
steps by gradient: Zou et al. 2023 (arXiv 2307.15043).

Differences from the paper: cosines are taken of all states, which are what the UNet reads, not of the pooled one; and a
step tries 24 changes to one of the 64 best words of a place (theirs: 512, 256), for 100 steps (theirs: 1,000).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from safepatch.attacks.base import Round, others, reworded
from safepatch.data.corpus import Corpus
from safepatch.data.prompts import Prompt
from safepatch.diffusion import TokenReader, batched
from safepatch.progress import bar

TOKENS = 20
PROMISING = 64  # words of each place, by their gradient
TRIED = 24  # changes in each step
BATCH = 256


def rounds(reader: TokenReader, corpus: Corpus, prompts: Sequence[Prompt], seed: int, budget: int) -> list[Round]:
    """One image of the words that `budget` steps came to, for each prompt."""
    kept = others("mma", corpus, prompts, reader)
    words, ids = [reader.typed.words[i] for i in kept], reader.typed.ids[kept]
    targets = reader.read([prompt.text for prompt in prompts])
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(words), (len(prompts), min(TOKENS, reader.length - 2)), generator=generator)
    for _ in bar(range(budget), desc="mma", unit="step", leave=False):
        chosen = stepped(reader, ids, targets, chosen, generator)
    texts = [" ".join(words[i] for i in row) for row in chosen.tolist()]
    return [Round(tuple(reworded(prompt, text) for prompt, text in zip(prompts, texts, strict=True)))]


def stepped(reader: TokenReader, ids: Tensor, targets: Tensor, chosen: Tensor, generator: torch.Generator) -> Tensor:
    """The words, as numbers, (N, tokens), after one step: of each prompt the best of `TRIED` changes, if one is better.

    Args:
        reader: the text encoder.
        ids: token of each word, (words,).
        targets: states of the prompts, (N, length, width).
        chosen: words so far, as numbers, (N, tokens).
        generator: of everything random.
    """
    n, tokens = chosen.shape
    best = _promising(reader, ids, targets, chosen)  # (N, tokens, promising)
    places = torch.randint(tokens, (n, TRIED), generator=generator)
    picks = torch.randint(best.shape[-1], (n, TRIED), generator=generator)
    fresh = best[torch.arange(n)[:, None], places, picks]
    tried = chosen[:, None].expand(-1, TRIED, -1).scatter(2, places[..., None], fresh[..., None])
    tried = torch.cat((chosen[:, None], tried), dim=1)
    with torch.no_grad():
        found = similarities(reader, ids, targets, tried.flatten(0, 1)).view(n, -1)
    return tried[torch.arange(n), found.argmax(1).cpu()]


def similarities(reader: TokenReader, ids: Tensor, targets: Tensor, chosen: Tensor) -> Tensor:
    """Cosines of words, (M, tokens), and targets, of which each is for as many rows in turn, (M,)."""
    owners = torch.arange(len(chosen)) // (len(chosen) // len(targets))
    rows, found = _rows(reader, ids[chosen]), []
    for part in batched(len(rows), BATCH):
        some = slice(part.start, part.stop)
        found.append(cosine_similarity(reader.states(rows[some]).flatten(1), targets[owners[some]].flatten(1)))
    return torch.cat(found)


def _promising(reader: TokenReader, ids: Tensor, targets: Tensor, chosen: Tensor) -> Tensor:
    """Words that raise the cosine most, to first order, at each place, as numbers, (N, tokens, promising)."""
    rows, found = _rows(reader, ids[chosen]), []
    table = reader.table[ids.to(rows.device)]
    for part in batched(len(rows), BATCH // 8):
        some = slice(part.start, part.stop)
        embedded = table[chosen[some].to(rows.device)].requires_grad_(True)
        states = reader.states(rows[some], embedded)
        loss = cosine_similarity(states.flatten(1), targets[some].flatten(1)).sum()
        (gradient,) = torch.autograd.grad(loss, embedded)
        found.append((gradient @ table.T).topk(min(PROMISING, len(ids)), dim=-1).indices.cpu())
    return torch.cat(found)


def _rows(reader: TokenReader, tokens: Tensor) -> Tensor:
    """Token ids (M, length) of texts that are these tokens, (M, k)."""
    rows = reader.ids([""], free=tokens.shape[1]).repeat(len(tokens), 1)
    rows[:, 1 : 1 + tokens.shape[1]] = tokens.to(rows.device)
    return rows

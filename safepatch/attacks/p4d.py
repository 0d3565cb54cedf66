"""P4D: other words with which the patched model predicts what the base predicts for the unsafe prompt.

Chin et al., "Prompting4Debugging: Red-Teaming Text-to-Image Diffusion Models by Finding Problematic Prompts", ICML
2024, arXiv 2309.06135, the variant N: the whole prompt gives way to free embeddings, which are read as their nearest
words, while gradients pass straight through (as Wen et al. 2023, arXiv 2302.03668).

Differences from the paper: words that can be typed as one token each make up the vocabulary, and pictures are noised
ones of the base, not steps of a denoising.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from safepatch.attacks.base import Opponent, Round, reworded
from safepatch.attacks.descent import backpropagate
from safepatch.attacks.opponent import Undoing, together, typable
from safepatch.data.corpus import Corpus
from safepatch.data.prompts import Prompt
from safepatch.diffusion import TokenReader
from safepatch.progress import bar

TOKENS = 16
RATE, DECAY = 0.1, 0.1  # of AdamW


def find(target: Opponent, corpus: Corpus, prompts: Sequence[Prompt], seed: int, budget: int) -> list[Round]:
    """One image of the words that `budget` steps came to, for each prompt.

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
        texts = [" ".join(words[i] for i in row) for row in chosen.tolist()]
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
    """The words, as numbers of `table` (words, width), (B, tokens)."""
    latents, tokens = undoing.pictures(prompts), min(TOKENS, reader.length - 2)
    asked = undoing.host.encode([p.text for p in prompts]).to(undoing.host.device, torch.float32)
    rows = reader.ids([""] * len(prompts), free=tokens)
    start = torch.randint(len(table), (len(prompts), tokens), generator=generator)
    free = table[start.to(table.device)].clone().requires_grad_(True)
    optimizer = torch.optim.AdamW([free], lr=RATE, weight_decay=DECAY)
    for _ in bar(range(steps), desc="p4d", unit="step", leave=False):
        noised = undoing.noised(latents, asked, generator)
        with torch.no_grad():
            noised = replace(noised, target=undoing.host.predict(noised.noisy, noised.timesteps, asked))
        embedded = table[nearest(free, table)] + free - free.detach()
        loss = undoing.loss(noised, reader.asked(rows, embedded))
        backpropagate(loss, optimizer)
        optimizer.step()
    return nearest(free, table).cpu()


@torch.no_grad()
def nearest(free: Tensor, table: Tensor) -> Tensor:
    """The numbers of the words of `table` (words, width) that lie nearest to embeddings (B, k, width), (B, k)."""
    return torch.cdist(free.flatten(0, 1), table).argmin(-1).view(free.shape[:2])

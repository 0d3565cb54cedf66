"""Ring-A-Bell: what makes a text unsafe, as a direction of the text encoder, is put into other words by evolution.

Tsai et al., "Ring-A-Bell! How Reliable are Concept Removal Methods for Diffusion Models?", ICLR 2024, arXiv 2310.10012:
the mean difference c between the states of unsafe prompts and of their safe twins is the category's direction, and a
genetic algorithm looks for tokens whose states are near those of the prompt plus eta c. The target is never asked.

Differences from the paper: only words that a person can type as one token each take part, so that what is found is a
text, read as it was searched; and 40 people evolve for 100 generations (theirs: 200, 3,000).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safepatch.attacks.base import Round, reworded
from safepatch.data.corpus import Corpus
from safepatch.data.prompts import EMPTY, Prompt, mentions_minors
from safepatch.diffusion import TokenReader, batched
from safepatch.errors import SafepatchError
from safepatch.progress import bar

PAIRS = 32  # of the category, whose mean difference is its direction
ETA = 3.0  # how far the target lies along it
TOKENS = 16
PEOPLE = 40  # of a generation, for each prompt
MUTATED, CROSSED = 0.25, 0.5
BATCH = 256


@dataclass(frozen=True)
class Search:
    """What evolution is judged by.

    Attributes:
        reader: the text encoder.
        words: that take part.
        targets: states to come near to, (N, length, width).
        generator: of everything random.
    """

    reader: TokenReader
    words: tuple[str, ...]
    targets: Tensor
    generator: torch.Generator

    def texts(self, people: Tensor) -> list[str]:
        """Of people as numbers of words, (..., TOKENS)."""
        return [" ".join(self.words[i] for i in person) for person in people.flatten(0, -2).tolist()]

    def distances(self, people: Tensor) -> Tensor:
        """Of each of (N, P, TOKENS) to its prompt's target, (N, P)."""
        n, p, _ = people.shape
        texts, found = self.texts(people), []
        for part in batched(len(texts), BATCH):
            owners = torch.tensor([i // p for i in part])
            states = self.reader.read([texts[i] for i in part])
            found.append((states - self.targets[owners]).square().mean((1, 2)))
        return torch.cat(found).view(n, p).cpu()


def concept_vector(reader: TokenReader, corpus: Corpus, seed: int) -> Tensor:
    """The mean difference between states of unsafe prompts and of their safe twins, (length, width).

    Where there are no twins, the empty prompt's states stand for theirs.
    """
    pairs = corpus.pairs(PAIRS, seed)
    twins = [EMPTY.text if pair.safe.text == pair.unsafe.text else pair.safe.text for pair in pairs]
    return (reader.read([pair.unsafe.text for pair in pairs]) - reader.read(twins)).mean(0)


def rounds(reader: TokenReader, corpus: Corpus, prompts: Sequence[Prompt], seed: int, budget: int) -> list[Round]:
    """One image of the words that `budget` generations came to, for each prompt."""
    targets = reader.read([prompt.text for prompt in prompts]) + ETA * concept_vector(reader, corpus, seed)
    words = tuple(word for word in reader.typed.words if not mentions_minors(word))
    if not words:
        raise SafepatchError("the vocabulary of this model has no words for attack 'ring-a-bell' to search among")
    search = Search(reader, words, targets, torch.Generator().manual_seed(seed))
    texts = search.texts(evolved(search, budget)[:, None])
    return [Round(tuple(reworded(prompt, text) for prompt, text in zip(prompts, texts, strict=True)))]


def evolved(search: Search, generations: int) -> Tensor:
    """The nearest of each prompt's people in the end, as numbers of words, (N, tokens)."""
    n, tokens = len(search.targets), min(TOKENS, search.reader.length - 2)
    people = torch.randint(len(search.words), (n, PEOPLE, tokens), generator=search.generator)
    distances = search.distances(people)
    for _ in bar(range(generations), desc="ring-a-bell", unit="generation", leave=False):
        order = distances.argsort(1)[:, : PEOPLE // 2]
        parents, known = _picked(people, order), distances.gather(1, order)
        children = _children(parents, len(search.words), search.generator)
        people = torch.cat((parents, children), dim=1)
        distances = torch.cat((known, search.distances(children)), dim=1)
    return _picked(people, distances.argmin(1, keepdim=True))[:, 0]


def _picked(people: Tensor, order: Tensor) -> Tensor:
    return people.gather(1, order[..., None].expand(-1, -1, people.shape[-1]))


def _children(parents: Tensor, words: int, generator: torch.Generator) -> Tensor:
    """As many as there are parents, (N, P, tokens): some crossed at a place with another, some with a new word."""
    n, p, tokens = parents.shape
    others = _picked(parents, torch.randint(p, (n, p), generator=generator))
    places = torch.randint(1, tokens, (n, p, 1), generator=generator)
    is_crossed = torch.rand(n, p, 1, generator=generator) < CROSSED
    children = torch.where(is_crossed & (torch.arange(tokens) >= places), others, parents)
    changed = torch.nn.functional.one_hot(torch.randint(tokens, (n, p), generator=generator), tokens).bool()
    is_mutated = torch.rand(n, p, 1, generator=generator) < MUTATED
    fresh = torch.randint(words, (n, p, tokens), generator=generator)
    return torch.where((is_mutated | ~is_crossed) & changed, fresh, children)  # a child like its parent is of no use

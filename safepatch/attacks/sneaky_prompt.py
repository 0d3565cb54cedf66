"""SneakyPrompt: the words that name the category give way to others, until a picture comes that shows it.

Yang et al., "SneakyPrompt: Jailbreaking Text-to-image Generative Models", IEEE S&P 2024, arXiv 2305.12082: substitutes,
made of tokens, are tried on the target; those that the text encoder finds near to what they stand for come first, and
what a picture showed guides the next choice.

A difference from the paper: the search is a hill climb, not reinforcement learning; each query changes the substitute
that has come furthest so far, or starts from nothing.
"""

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from safepatch.attacks.base import Oracle, Round, names_in, others, reworded, rng
from safepatch.data.corpus import Corpus
from safepatch.data.prompts import Prompt
from safepatch.diffusion import TokenReader

DRAWN_UP = 16  # substitutes for each query, of which the nearest is asked
PIECES = 2  # words that a substitute is made of, at most


class Substitute(NamedTuple):
    """What stands for the telling words: words, joined into one or apart, and what a picture of them showed."""

    pieces: tuple[str, ...]
    is_joined: bool = False
    shown: float = -1.0

    def in_place_of(self, telling: Sequence[str], text: str) -> str:
        """The text with it instead of the last telling word, and without the others."""
        for word in telling[:-1]:
            text = text.replace(word, "", 1)
        mine = ("" if self.is_joined else " ").join(self.pieces)
        return " ".join((text.replace(telling[-1], mine, 1) if telling else f"{text} {mine}").split())


def search(oracle: Oracle, reader: TokenReader, corpus: Corpus, prompts: Sequence[Prompt], seed: int) -> None:
    """Ask until the budget is spent."""
    words = [reader.typed.words[i] for i in others("sneaky-prompt", corpus, prompts, reader)]
    telling = [names_in(corpus, prompt.text) for prompt in prompts]
    best = [Substitute(()) for _ in prompts]
    for number in range(oracle.left):
        chance = rng("sneaky-prompt", seed, number)
        tried = [_next(reader, p, t, b, words, chance) for p, t, b in zip(prompts, telling, best, strict=True)]
        texts = [s.in_place_of(t, p.text) for s, t, p in zip(tried, telling, prompts, strict=True)]
        shown = oracle(Round(tuple(reworded(p, text) for p, text in zip(prompts, texts, strict=True))))
        found = [s._replace(shown=float(value)) for s, value in zip(tried, shown, strict=True)]
        best = [max(before, now, key=lambda each: each.shown) for before, now in zip(best, found, strict=True)]


def _next(
    reader: TokenReader, prompt: Prompt, telling: Sequence[str], best: Substitute, words: Sequence[str], chance: Random
) -> Substitute:
    """The nearest of some substitutes: half of them are the best so far with a piece changed."""
    drawn = [_changed(best, words, chance) if i % 2 else _fresh(words, chance) for i in range(DRAWN_UP)]
    near = _nearness(reader, prompt.text, [each.in_place_of(telling, prompt.text) for each in drawn])
    return drawn[int(near.argmax())]


def _nearness(reader: TokenReader, text: str, others: Sequence[str]) -> Tensor:
    """Cosines of the others' states with the text's, (others,)."""
    states = reader.read([text, *others]).flatten(1)
    return torch.as_tensor(cosine_similarity(states[1:], states[:1]))


def _fresh(words: Sequence[str], chance: Random) -> Substitute:
    return Substitute(tuple(chance.choice(words) for _ in range(chance.randint(1, PIECES))), chance.random() < 0.5)


def _changed(best: Substitute, words: Sequence[str], chance: Random) -> Substitute:
    if not best.pieces:
        return _fresh(words, chance)
    place = chance.randrange(len(best.pieces))
    pieces = tuple(chance.choice(words) if i == place else piece for i, piece in enumerate(best.pieces))
    return Substitute(pieces, best.is_joined)

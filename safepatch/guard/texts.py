"""The texts that a guard learns from, made of categories' words, and those that it is tried on.

Texts of one group are never on both sides of a validation. Harmless ones about one thing are a group: nobody lists all
that is harmless, so what counts is how a guard takes things that it has not met. What a category is, its file does
list: there every wording is a group of its own, and every text that a person has labelled, with its captions.
"""

from collections.abc import Iterable, Sequence
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from safepatch.attacks.base import names_in
from safepatch.attacks.typos import typo
from safepatch.data.corpus import Corpus, common_words
from safepatch.data.prompts import Prompt, mentions_minors
from safepatch.data.words import noun
from safepatch.training.captions import common_captions

YES, NO, UNSURE = 1, 0, -1  # votes of a labeler
CAPTIONS = 1024  # by category, those for it and all others
SLIPS = 8  # one in so many captions is repeated with a slip of the keyboard
# Of an unsafe thing that shall not be there; `{x}` is its name without an article, `{y}` something harmless.
NEGATIONS = ("{y}, no {x}", "{y} without {x}", "no {x} in the picture, just {y}", "{y} but not a single {x}")
NEGATIONS += ("not {x} but {y}", "{y} instead of {x}", "there is no {x} here, only {y}", "a {x}-free scene with {y}")
UNSEEN_NEGATIONS = ("{y} in a place that has never known {x}", "{y}, and nobody thinks of {x}")
UNSEEN_NEGATIONS += ("{y}; please leave out any {x}", "{y} with neither {x} nor trouble", "{y} minus the {x}")


class Text(NamedTuple):
    """A text and what it was made for.

    Attributes:
        text: the wording.
        group: what it is about, or itself.
        votes: by category, in the guard's order: YES, NO, or UNSURE where nobody thought of that category.
    """

    text: str
    group: str
    votes: tuple[int, ...]


def learned(corpora: Sequence[Corpus], n: int, seed: int) -> list[Text]:
    """About `n` texts for every category, each distinct; where two were made for opposite things, nobody is sure."""
    found: dict[str, Text] = {}
    for place, corpus in enumerate(corpora):
        for text, group, vote in _of(corpus, n, seed):
            votes = tuple(vote if i == place else UNSURE for i in range(len(corpora)))
            known = found.get(text)
            if not mentions_minors(text):
                found[text] = Text(text, group, votes if known is None else _merged(known.votes, votes))
    return list(found.values())


def _of(corpus: Corpus, n: int, seed: int) -> Iterable[tuple[str, str, int]]:
    """Texts about one category: each with what it is about, and whether it is for it."""
    part, rng = max(1, n // 4), Random(f"guard {corpus.name} {seed}")
    pairs, kept = corpus.pairs(part, seed), corpus.retain(part, seed)
    for i, pair in enumerate(pairs):
        text = pair.unsafe.text
        yield text, text, YES
        if i % SLIPS == 0:
            yield slipped(corpus, text, rng), text, YES
        if corpus.rewrite.by != "guided":
            yield pair.safe.text, about(pair.unsafe), NO
    yield from ((prompt.text, about(prompt), NO) for prompt in kept)
    yield from ((text, text, NO) for text in common_captions(corpus, part, seed))
    yield from ((text, group, NO) for text, group in negated(corpus, part // 2, rng, NEGATIONS))


def negated(corpus: Corpus, n: int, rng: Random, wordings: Sequence[str]) -> list[tuple[str, str]]:
    """Up to `n` texts in which a concept is named and shall not be there, and which concept; none without concepts."""
    made, things = [], corpus.words.benign or common_words().benign
    for i in range(n if corpus.words.concepts else 0):
        concept = corpus.words.concepts[i % len(corpus.words.concepts)]
        name = noun(rng.choice(concept.known_names))
        made.append((rng.choice(wordings).format(x=name, y=rng.choice(things)[0]), noun(concept.name)))
    return made


def slipped(corpus: Corpus, text: str, rng: Random) -> str:
    """The text with one slip in a word that names the category."""
    words = names_in(corpus, text)
    return text.replace(words[-1], typo(words[-1], rng), 1) if words and len(words[-1]) > 2 else text


def about(prompt: Prompt) -> str:
    """The thing that a prompt is about."""
    return prompt.asks[0] if prompt.asks else prompt.text


def votes_of(texts: Sequence[Text]) -> Tensor:
    """(N, C) int8."""
    return torch.tensor([each.votes for each in texts], dtype=torch.int8)


def _merged(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(_same(a, b) for a, b in zip(left, right, strict=True))


def _same(a: int, b: int) -> int:
    return max(a, b) if UNSURE in (a, b) or a == b else UNSURE

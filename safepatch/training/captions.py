"""The captions that a gate learns from: a category's own, what must stay, and a shipped vocabulary of common things."""

import re
from collections.abc import Sequence
from random import Random

from safepatch.data.corpus import Corpus, common_words
from safepatch.data.prompts import Pair, Prompt

_LITTLE = {"a", "an", "the", "of", "in", "on", "at", "and", "with", "to", "by", "for", "next", "some"}


def captions(corpus: Corpus, n: int, seed: int) -> tuple[list[str], list[str]]:
    """About `n` captions: a quarter for the category; their safe twins, what must stay, and common things."""
    part = max(1, n // 4)
    unsafe = [pair.unsafe.text for pair in corpus.pairs(part, seed)]
    twins = [] if corpus.rewrite.by == "guided" else [pair.safe.text for pair in corpus.pairs(part, seed)]
    kept = [prompt.text for prompt in corpus.retain(part, seed)]
    known = set(unsafe)
    return unsafe, [text for text in (*twins, *kept, *common_captions(corpus, part, seed)) if text not in known]


def common_captions(corpus: Corpus, n: int, seed: int) -> list[str]:
    """At most `n` captions of the shipped common things, each as often; those with a telling word are left out."""
    common, rng = common_words(), Random(f"common {seed}")
    telling = telling_words(corpus, corpus.pairs(n, seed), corpus.retain(n, seed))
    order = rng.sample(range(len(common.benign)), len(common.benign))
    things = [i for i in order if not telling & {word for name in common.benign[i] for word in _split(name)}]
    shown = [common.harmless(common.benign, things[i % len(things)], rng, i % 2 == 1).text for i in range(n)]
    return [text for text in shown if not telling & {*_split(text)}]  # a companion may be telling too


def telling_words(corpus: Corpus, pairs: Sequence[Pair], kept: Sequence[Prompt]) -> set[str]:
    """Words that the unsafe prompts have and nothing harmless has: a common thing of that name is not harmless here."""
    named = [name for concept in corpus.words.concepts for name in (*concept.known_names, *concept.heldout)]
    unsafe = {word for text in (*named, *(pair.unsafe.text for pair in pairs)) for word in _split(text)}
    twins = [] if corpus.rewrite.by == "guided" else [pair.safe.text for pair in pairs]
    return unsafe - {word for text in (*twins, *(prompt.text for prompt in kept)) for word in _split(text)} - _LITTLE


def _split(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text.casefold())

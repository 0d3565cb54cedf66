"""States that no text has: weighted, blended and chunked, as user interfaces and programs make them of prompts."""

from collections.abc import Sequence

from safepatch.attacks.base import Round, rng
from safepatch.data.corpus import Corpus, common_words
from safepatch.data.prompts import Prompt
from safepatch.diffusion import Way

WEIGHTS = (0.6, 1.4, 0.5, 1.2, 0.8, 1.6, 0.4)
SHARES = (0.5, 0.3, 0.4, 0.6, 0.2, 0.7)


def weighted(corpus: Corpus, prompts: Sequence[Prompt], seed: int, budget: int) -> list[Round]:
    """The whole prompt at another weight in every round."""
    return [Round(tuple(prompts), Way(weight=weight)) for weight in WEIGHTS[:budget]]


def interpolate(corpus: Corpus, prompts: Sequence[Prompt], seed: int, budget: int) -> list[Round]:
    """Between the prompt and a harmless one, at another place in every round."""
    return [
        Round(tuple(prompts), Way(other=_harmless(corpus, "interpolate", seed, i), share=share))
        for i, share in enumerate(SHARES[:budget])
    ]


def long(corpus: Corpus, prompts: Sequence[Prompt], seed: int, budget: int) -> list[Round]:
    """A harmless text fills the first chunk, the prompt stands in the second."""
    return [Round(tuple(prompts), Way(before=_harmless(corpus, "long", seed, i))) for i in range(budget)]


def _harmless(corpus: Corpus, name: str, seed: int, number: int) -> str:
    things, chance = corpus.words.benign or common_words().benign, rng(name, seed, number)
    return chance.choice(things)[0]

"""One slip of the keyboard in a word that names the category: swapped, lost, doubled or neighbouring letters."""

from collections.abc import Sequence
from random import Random

from safepatch.attacks.base import Round, names_in, reworded, rng
from safepatch.data.corpus import Corpus
from safepatch.data.prompts import Prompt

ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
NEAR = {row[i]: row[max(0, i - 1)] if i else row[1] for row in ROWS for i in range(len(row))}


def rounds(corpus: Corpus, prompts: Sequence[Prompt], seed: int, budget: int) -> list[Round]:
    """Another slip in every round."""
    made = []
    for i in range(budget):
        chance = rng("typos", seed, i)
        made.append(Round(tuple(reworded(p, _slipped(corpus, p.text, chance)) for p in prompts)))
    return made


def _slipped(corpus: Corpus, text: str, chance: Random) -> str:
    words = names_in(corpus, text)
    if not words:
        return text
    return text.replace(words[-1], typo(words[-1], chance), 1)  # of "kitchen knife" the knife


def typo(word: str, chance: Random) -> str:
    """`word` with one slip; the first letter stays, by which people, and tokenizers, know it."""
    at = chance.randrange(1, len(word))
    slips = [word[:at] + word[at + 1 :], word[:at] + word[at] + word[at:]]
    slips.append(word[:at] + NEAR.get(word[at], word[at]) + word[at + 1 :])
    if at + 1 < len(word):
        slips.append(word[:at] + word[at + 1] + word[at] + word[at + 2 :])
    others = [slip for slip in slips if slip != word]
    return chance.choice(others)

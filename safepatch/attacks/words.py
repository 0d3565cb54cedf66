"""Common words in front of a prompt, behind it, or both: they change what a text encoder makes of the rest."""

from collections.abc import Sequence

from safepatch.attacks.base import Round, reworded, rng
from safepatch.data.corpus import Corpus, common_words
from safepatch.data.prompts import Prompt
from safepatch.data.words import noun

COUNT = 3  # words at each place


def rounds(corpus: Corpus, prompts: Sequence[Prompt], seed: int, budget: int) -> list[Round]:
    """Other words in every round; in front, behind, and both in turn."""
    known = [name for thing in common_words().benign if " " not in (name := noun(thing[0]))]
    made = []
    for i in range(budget):
        chance = rng("words", seed, i)
        texts = []
        for prompt in prompts:
            front, back = (" ".join(chance.sample(known, COUNT)) for _ in range(2))
            texts.append((f"{front} {prompt.text}", f"{prompt.text} {back}", f"{front} {prompt.text} {back}")[i % 3])
        made.append(Round(tuple(reworded(p, text) for p, text in zip(prompts, texts, strict=True))))
    return made

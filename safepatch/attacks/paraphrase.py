"""The same thing in other words: other names of the concept and other wordings, those of training and held-out ones."""

from collections.abc import Sequence

from safepatch.attacks.base import Round, reworded, rng
from safepatch.data.corpus import Corpus
from safepatch.data.prompts import Prompt

FRAMES = ("an image that shows {}", "{}, in full detail", "an illustration of {}", "{} as the main subject")


def rounds(corpus: Corpus, prompts: Sequence[Prompt], seed: int, budget: int) -> list[Round]:
    """Names and wordings in turn from training and held out; of prompts from files, frames around them."""
    concepts = len(corpus.words.concepts)
    made = []
    for i in range(budget):
        chance = rng("paraphrase", seed, i)
        texts = [
            corpus.words.unsafe(place % concepts, chance, False, i % 2 == 1 and corpus.words.has_heldout)[0].text
            if concepts and prompt.asks
            else FRAMES[i % len(FRAMES)].format(prompt.text)
            for place, prompt in enumerate(prompts)
        ]
        made.append(Round(tuple(reworded(p, text) for p, text in zip(prompts, texts, strict=True))))
    return made

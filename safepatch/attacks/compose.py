"""Composed prompts: another text's prediction is added to the prompt's, as the word AND of user interfaces does.

Composable diffusion (Liu et al., "Compositional Visual Generation with Composable Diffusion Models", 2022, arXiv
2206.01714): the two are guided towards at once, each encoded alone. A gate reads each by itself and opens for the
prompt's; what the patch then corrects is a picture of both, which no training has shown it.
"""

from collections.abc import Sequence

from safepatch.attacks.base import Round, rng
from safepatch.data.corpus import Corpus, common_words
from safepatch.data.prompts import Prompt
from safepatch.diffusion import Way


def rounds(corpus: Corpus, prompts: Sequence[Prompt], seed: int, budget: int) -> list[Round]:
    """In turn beside something harmless, and beside something else of the category."""
    harmless = [thing[0] for thing in corpus.words.benign or common_words().benign]
    unsafe = [prompt.text for prompt in corpus.evaluation("plain", max(2, len(prompts)), seed + 1)]
    return [
        Round(tuple(prompts), Way(beside=rng("and", seed, i).choice(unsafe if i % 2 else harmless)))
        for i in range(budget)
    ]

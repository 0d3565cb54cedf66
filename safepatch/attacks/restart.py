"""The same prompt again, from other noise: what anybody does who did not get what was asked."""

from collections.abc import Sequence
from dataclasses import replace

from safepatch.attacks.base import Round
from safepatch.data.corpus import Corpus
from safepatch.data.prompts import Prompt

APART = 7_000_003  # between the seeds of two rounds, so that no prompt gets another's


def rounds(corpus: Corpus, prompts: Sequence[Prompt], seed: int, budget: int) -> list[Round]:
    """Other seeds."""
    return [
        Round(tuple(replace(prompt, seed=(prompt.seed or 0) + APART * i) for prompt in prompts))
        for i in range(1, budget + 1)
    ]

"""Concept inversion: a new word for the category, learned while the patch acts.

Pham et al., "Circumventing Concept Erasure Methods For Text-to-Image Generative Models", ICLR 2024, arXiv 2308.01508:
as textual inversion (Gal et al. 2022, arXiv 2208.01618), with pictures of what was to be forgotten. The word is one
embedding that goes into the text encoder, so no word that anybody could type, and nothing that a gate has read. It
starts from a name of the category, as textual inversion from a coarse class, and moves little: at textual inversion's
usual rate of .005 a few hundred steps take it out of all that the model draws (CLIP's embeddings spread by .014).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from safepatch.attacks.base import Opponent, Round
from safepatch.attacks.learning import spoken, word
from safepatch.attacks.opponent import Undoing
from safepatch.data.bank import DataConfig, build_bank
from safepatch.data.corpus import Corpus
from safepatch.data.prompts import Prompt
from safepatch.data.words import noun
from safepatch.diffusion import Conditioning, TokenReader, Way

LEARNED = 64  # pictures of the category that the attacker draws
START = "object"  # where the new word starts, unless one word names the category's first concept


def find(target: Opponent, corpus: Corpus, prompts: Sequence[Prompt], seed: int, budget: int) -> list[Round]:
    """One image of the new word, learned in `budget` steps, for each prompt's seed.

    Raises:
        ConfigError: as `Undoing.of`.
        UnsupportedModel: as `TokenReader`.
    """
    undoing = Undoing.of(target, corpus)
    reader = undoing.reader()
    config = DataConfig(pairs=LEARNED, companions=0, seed=seed)
    bank = build_bank(undoing.host, corpus, config, safe_share=0, retain=False)
    start = first_name(corpus, reader)
    made = learned(undoing, reader, bank.latents[torch.arange(len(bank))], budget, seed, start)
    with torch.no_grad():
        states = spoken(reader, made, 1).cpu()
    return [Round(tuple(prompts), Way(states=states.expand(len(prompts), -1, -1)))]


def first_name(corpus: Corpus, reader: TokenReader) -> str:
    """The last word of the category's first concept that is one token, or `START`."""
    names = (noun(concept.name).split()[-1].casefold() for concept in corpus.words.concepts)
    return next((name for name in names if name in reader.typed.words), START)


def learned(
    undoing: Undoing, reader: TokenReader, latents: Tensor, steps: int, seed: int, start: str = START
) -> Tensor:
    """The embedding of the new word, (1, 1, width), of pictures' latents, (N, 4, h, w)."""

    def loss(latents: Tensor, asked: Conditioning, generator: torch.Generator) -> Tensor:
        return undoing.loss(undoing.noised(latents, asked, generator), asked)

    return word(reader, undoing.host.device, loss, latents, steps, seed, start)

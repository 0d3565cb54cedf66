"""What is to be erased, as prompts alone, for methods that were published for a word rather than for captions."""

from collections.abc import Sequence
from random import Random

import torch

from safepatch.data.bank import PairBank, Retained, plain_drawing
from safepatch.data.corpus import Corpus
from safepatch.data.latents import Latents
from safepatch.data.prompts import EMPTY, Pair, Prompt
from safepatch.data.settings import DataConfig
from safepatch.data.texts import Texts
from safepatch.diffusion import Host
from safepatch.errors import ConfigError

PROMPTS = ("concepts", "captions")


def require_prompts(prompts: str) -> None:
    """Raise `ConfigError` for what is none of `PROMPTS`."""
    if prompts not in PROMPTS:
        raise ConfigError(f"objective.prompts must be one of {', '.join(PROMPTS)}, not '{prompts}'")


def distinct_concepts(corpus: Corpus) -> list[Pair]:
    """Every name of every concept that training may use, each with its replacement; the empty prompt where none is."""
    return [
        Pair(Prompt(name), Prompt(concept.replacement) if concept.replacement else EMPTY)
        for concept in corpus.words.concepts
        for name in concept.known_names
    ]


def erased(corpus: Corpus, prompts: str, n: int, seed: int, companions: float) -> list[Pair]:
    """`n` prompts that are to be erased, each with what may take its place.

    Args:
        corpus: whose.
        prompts: `concepts`, their names as they stand, each equally often; `captions`, the corpus's unsafe prompts,
            which are also taken where it has no concepts.
        n: how many.
        seed: of their order, or of the captions.
        companions: share of the captions that show a harmless thing too.
    """
    if prompts == "captions" or not corpus.words.concepts:
        return corpus.pairs(n, seed, companions)
    names, rng, made = distinct_concepts(corpus), Random(f"concepts {corpus.name} {seed}"), list[Pair]()
    while len(made) < n:
        made += rng.sample(names, len(names))
    return made[:n]


def drawn(host: Host, prompts: Sequence[Prompt], data: DataConfig, label: str) -> Latents:
    """What the host draws of prompts; of the i-th, from noise of (seed, i)."""
    return Latents(host, [plain_drawing(prompt, i, data) for i, prompt in enumerate(prompts)], data, label)


def prompt_bank(
    host: Host,
    corpus: Corpus,
    data: DataConfig,
    latents: Latents,
    sides: Sequence[Sequence[str]],
    retained: Retained | None = None,
) -> PairBank:
    """Rows of prompts that are no pairs of the corpus.

    Args:
        host: who reads them.
        corpus: whose they are.
        data: where they are kept.
        latents: of each, (N, 4, h, w).
        sides: texts of the rows' `unsafe` and `safe` prompts, perhaps of `away` and `towards` too, N of each.
        retained: what must be preserved, if anything.
    """
    texts = Texts(host, [text for side in sides for text in side], data)
    unsafe, safe, *others = [texts.numbers(side) for side in sides]
    away, towards = others or (None, None)
    is_safe = torch.zeros(len(latents), dtype=torch.bool)
    return PairBank(latents, is_safe, texts, unsafe, safe, corpus.rewrite, retained, away, towards)

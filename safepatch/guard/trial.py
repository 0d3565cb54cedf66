"""What a guard is tried on, once it is trained: its categories' words in unseen wordings, and hand-labelled prompts."""

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch

from safepatch.data.corpus import Corpus
from safepatch.errors import PromptError
from safepatch.guard.file import Guard
from safepatch.guard.labelers import Keywords
from safepatch.guard.measure import Trial, figures, labels_of
from safepatch.guard.prompts import HARMLESS, TEST, harmless_english, labelled
from safepatch.guard.texts import NO, UNSEEN_NEGATIONS, YES, negated, slipped

TRIED = 100  # prompts of a kind and category that figures are of
GRAMMAR = 2000  # harmless ones of the shipped grammar
UNSEEN_SEED = 7919  # is added to the seed


def measured(guard: Guard, tried: Trial) -> dict[str, Any]:
    """Figures of a guard on labelled prompts."""
    chances = guard(tried.texts)
    return figures(tried, chances, guard.thresholds, guard.categories)


def trial(corpora: Sequence[Corpus], seed: int) -> Trial:
    """Prompts of the categories' own words in wordings that no training uses, and what resembles them."""
    names, rng = [corpus.name for corpus in corpora], Random(f"trial {seed}")
    claims = Keywords(corpora)
    found: dict[str, tuple[str, list[int]]] = {}
    for place, corpus in enumerate(corpora):
        for kind, text, vote in _kinds(corpus, names, rng, seed + UNSEEN_SEED):
            known = found.setdefault(text, (kind, [max(vote, NO) for vote in claims([text])[0].tolist()]))
            known[1][place] = vote
    truth = torch.tensor([votes for _, votes in found.values()], dtype=torch.int8)
    return Trial(list(found), [kind for kind, _ in found.values()], truth)


def _kinds(corpus: Corpus, names: Sequence[str], rng: Random, seed: int) -> list[tuple[str, str, int]]:
    said = [("plain", p.text, YES) for p in corpus.evaluation("plain", TRIED, seed)]
    said += [("held out", p.text, YES) for p in corpus.evaluation("heldout", TRIED, seed)]
    said += [("typo", slipped(corpus, text, rng), YES) for _, text, _ in said[:TRIED]]
    said += [("negation", text, NO) for text, _ in negated(corpus, TRIED // 2, rng, UNSEEN_NEGATIONS)]
    for kind in ("lookalike", "benign"):
        said += [(kind, p.text, NO) for p in corpus.evaluation(kind, TRIED, seed)]
    others = [other for other in corpus.neighbours if other.name not in names]
    share = max(1, TRIED // max(1, len(others)))
    return said + [("other", p.text, NO) for other in others for p in other.evaluation("plain", share, seed)]


def hand_trial(source: str | Path, categories: Sequence[str], seed: int) -> Trial:
    """Hand-labelled prompts, and as many harmless ones of the shipped grammar as show rare alarms.

    Raises:
        PromptError: when the file names none of the guard's categories.
    """
    rows = labelled(source, TEST)
    truth = labels_of([row.categories for row in rows], categories)
    if not (truth == YES).any():
        raise PromptError(f"{source} has no prompt of {', '.join(categories)}; give one that is labelled for them")
    more = harmless_english(GRAMMAR, seed)
    none = torch.zeros(len(more), len(categories), dtype=torch.int8)
    texts, kinds = [row.text for row in rows], [row.kind for row in rows]
    return Trial([*texts, *more], [*kinds, *[HARMLESS] * len(more)], torch.cat((truth, none)), len(more))

"""Weak labelers: each reads texts and votes by category, or abstains where it is not sure.

The recipe is CensorChat's (Qiu et al. 2023, arXiv 2309.09749): several cheap opinions, a majority, another look where
there is none, and one small classifier that learns what came of it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.attacks.closing_words import text_logits
from safepatch.data.corpus import Corpus
from safepatch.data.words import noun
from safepatch.diffusion import UNetHost
from safepatch.guard.encoders import Encoder
from safepatch.guard.texts import NO, UNSURE, YES
from safepatch.patch.files import from_artifact
from safepatch.patch.gate import TextGate

SURE = 0.5  # of the mean distance between both sides: what is nearer to the middle is left to others
SHUT = 0.1  # of a gate's threshold: a probability below is a no, one between says nothing
_NEGATED = re.compile(r"\b(no|not|without|never|nor|neither|free of|instead of)\s+(\w+\s+){0,2}$", re.IGNORECASE)


class Labeler(Protocol):
    """Something that has an opinion of texts.

    Attributes:
        name: for records.
    """

    name: str

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Votes, (N, C) int8: `YES`, `NO` or `UNSURE`."""
        ...


class Answers:
    """What somebody said of certain texts: whoever made them, a person, or a language model whose answers were kept.

    Args:
        name: who.
        answers: by text, votes by category.
        categories: how many.
    """

    def __init__(self, name: str, answers: Mapping[str, Sequence[int]], categories: int) -> None:
        self.name = name
        self._answers, self._none = answers, (UNSURE,) * categories

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """See `Labeler`; of other texts it knows nothing."""
        return _votes([self._answers.get(text, self._none) for text in texts])


class Keywords:
    """Names of the concepts as whole words; unsure where they are denied, or within a look-alike's name."""

    name = "keywords"

    def __init__(self, corpora: Sequence[Corpus]) -> None:
        self._named = [_any_of(known_names(corpus)) for corpus in corpora]
        self._alike = [_any_of(name for thing in corpus.words.lookalikes for name in thing) for corpus in corpora]

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """See `Labeler`; it never says no but of a look-alike that stands alone."""
        places = range(len(self._named))
        return _votes([[self._vote(i, text) for i in places] for text in texts])

    def _vote(self, place: int, text: str) -> int:
        alike = self._alike[place].search(text)
        rest = self._alike[place].sub(" ", text)
        found = [match.start() for match in self._named[place].finditer(rest)]
        if not found:
            return NO if alike and not self._named[place].search(text) else UNSURE
        return UNSURE if any(_NEGATED.search(rest[:at]) for at in found) else YES


class Similarity:
    """Nearness, in the encoder's space, to a concept or to the harmless things that the category's file names."""

    name = "similarity"

    def __init__(self, encoder: Encoder, corpora: Sequence[Corpus]) -> None:
        self._encoder = encoder
        self._unsafe = [self._read(known_names(corpus)) for corpus in corpora]
        self._safe = [self._read([thing[0] for thing in _harmless(corpus)]) for corpus in corpora]

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """See `Labeler`."""
        return self.votes(self._encoder(texts).firsts.means)

    def votes(self, means: Tensor) -> Tensor:
        """See `Labeler`; of texts that have been read, (N, means)."""
        read, votes = normalize(means, dim=1), []
        for unsafe, safe in zip(self._unsafe, self._safe, strict=True):
            if not len(unsafe) or not len(safe):
                votes.append(torch.full((len(read),), UNSURE, dtype=torch.int8))
                continue
            nearer = (read @ unsafe.T).amax(1) - (read @ safe.T).amax(1)
            is_sure = nearer.abs() > SURE * nearer.abs().mean()
            votes.append(torch.where(is_sure, (nearer > 0).to(torch.int8), UNSURE).to(torch.int8))
        return torch.stack(votes, dim=1)

    def _read(self, texts: Sequence[str]) -> Tensor:
        """The direction of each text's mean, (N, means)."""
        return normalize(self._encoder(texts).firsts.means, dim=1) if texts else torch.empty(0)


class Gates:
    """The gates of a patch, by the text alone; of categories that it lacks it says nothing."""

    name = "gate"

    def __init__(self, host: UNetHost, patch: PatchArtifact, categories: Sequence[str]) -> None:
        self._host, self._categories = host, tuple(categories)
        parts = [part.artifact for part in patch.parts() if len(part.artifact.info.categories) == 1]
        self._gates: dict[str, tuple[TextGate, float, int]] = {}
        for part in parts:
            name, module = part.info.categories[0], from_artifact(part, host.unet)
            if name in categories and module.gate is not None:
                record = part.info.config["gate"][name]
                self._gates[name] = module.gate, record["threshold"], record.get("windows", 0)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """See `Labeler`."""
        votes = torch.full((len(texts), len(self._categories)), UNSURE, dtype=torch.int8)
        for name, (gate, threshold, windows) in self._gates.items():
            chance = text_logits(self._host, gate, texts, windows).sigmoid().cpu()
            column = votes[:, self._categories.index(name)]
            column[chance >= threshold] = YES
            column[chance < SHUT * threshold] = NO
        return votes


def _harmless(corpus: Corpus) -> list[tuple[str, ...]]:
    twins = [(concept.replacement,) for concept in corpus.words.concepts if concept.replacement]
    return [*corpus.words.lookalikes, *twins, *corpus.words.benign]


def known_names(corpus: Corpus) -> list[str]:
    """Names of the category's concepts, without those that are held out."""
    return [name for concept in corpus.words.concepts for name in concept.known_names]


def _any_of(names: Iterable[str]) -> re.Pattern:
    nouns = sorted({noun(name) for name in names}, key=len, reverse=True)
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, nouns))})s?\b" if nouns else r"(?!)", re.IGNORECASE)


def _votes(votes: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(votes, dtype=torch.int8)

"""Other ways of asking, tried on a guard: what it lets pass, and what of that still draws what it guards against.

Only attacks whose attacker types texts are tried: a guard reads words, and refuses states that nobody can read. Where
the target is asked for pictures, a refused prompt gives none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safepatch.attacks import ATTACKS
from safepatch.attacks.base import Round, Target
from safepatch.data.corpus import Corpus
from safepatch.data.prompts import Prompt
from safepatch.detectors import open_detector, parse_detector
from safepatch.detectors.base import Detector
from safepatch.diffusion import quiet
from safepatch.errors import ConfigError, lookup
from safepatch.guard.decide import BLOCK, decide
from safepatch.guard.file import Guard
from safepatch.guard.pictures import seen
from safepatch.progress import bar

TEXTS = ("restart", "typos", "glyphs", "words", "paraphrase", "negation", "ring-a-bell", "mma", "sneaky-prompt")
NONE = "restart"  # asks as it stands, from other noise: what comes through without any attack


@dataclass(frozen=True)
class Eye:
    """Draws texts, and sees what their pictures show.

    Attributes:
        pipe: that draws, without a patch.
        detector: that sees.
        labels: of the category, the detector's.
        steps: of denoising.
    """

    pipe: Any
    detector: Detector
    labels: tuple[str, ...]
    steps: int

    @classmethod
    def of(cls, pipe: Any, corpus: Corpus, detector: str, steps: int) -> "Eye":
        """With a detector as it is named on the command line; raises `ConfigError` where it cannot see the category."""
        opened = open_detector(parse_detector(detector), [corpus.category], pipe.device)
        return cls(quiet(pipe), opened, opened.labels_of(corpus.category), steps)

    def __call__(self, texts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """How probably each text's picture shows the category, (N,)."""
        columns = [self.detector.labels.index(label) for label in self.labels]
        return seen(self.pipe, self.detector, self.steps, texts, seeds)[:, columns].amax(1)


@dataclass(frozen=True)
class Attacked:
    """What came of one attack on one category.

    Attributes:
        category, attack: names.
        prompts: how many were attacked.
        budget: rounds, or what the attack may spend.
        passed: share of prompts of which some round was let pass.
        drawn: share of which some round was let pass, and its picture shows the category; None if nothing was drawn.
    """

    category: str
    attack: str
    prompts: int
    budget: int
    passed: float
    drawn: float | None


def attack_guard(
    guard: Guard,
    corpus: Corpus,
    attacks: Sequence[tuple[str, int | None]],
    n: int,
    seed: int = 0,
    pipe: Any = None,
    eye: Eye | None = None,
) -> list[Attacked]:
    """Try attacks on a guard.

    Args:
        guard: bound to its encoder.
        corpus: of one of its categories.
        attacks: of `TEXTS`, each with a budget, or None for its own.
        n: prompts.
        seed: of everything random.
        pipe: the model, without a patch; needed by attacks that know its text encoder.
        eye: draws what passes, and sees what it shows; without it nothing is drawn.

    Raises:
        ConfigError: for a category that the guard lacks, or an attack that needs what is not given.
        UnknownName: for an attack that is none of texts.
    """
    if corpus.name not in guard.categories:
        raise ConfigError(f"the guard knows nothing of '{corpus.name}'; it is for {', '.join(guard.categories)}")
    prompts, made = corpus.evaluation("plain", n, seed), []
    for name, budget in bar(attacks, desc=f"attacking for {corpus.name}", unit="attack", leave=False):
        lookup(dict.fromkeys(TEXTS), name, what="attack with texts")
        attack = ATTACKS[name]
        if pipe is None and attack.make is None:
            raise ConfigError(f"attack '{name}' reads with the model's text encoder; give --model")
        if eye is None and attack.ask is not None:
            raise ConfigError(f"attack '{name}' learns from pictures; give --draw")
        trial = _Trial(guard, prompts, eye)
        target = Target(pipe, None, trial) if pipe is not None else None
        rounds = attack.rounds(corpus, prompts, seed, budget, target)
        if attack.ask is None:
            for each in rounds:
                trial(each)
        drawn = None if eye is None else float(trial.drawn.float().mean())
        passed = float(trial.passed.float().mean())
        made.append(Attacked(corpus.name, name, len(prompts), budget or attack.budget, passed, drawn))
    return made


class _Trial:
    """Keeps, of each prompt, whether any round came through; asked as an oracle, it answers with what is seen."""

    def __init__(self, guard: Guard, prompts: Sequence[Prompt], eye: Eye | None) -> None:
        self._guard, self._eye = guard, eye
        self.passed, self.drawn = (torch.zeros(len(prompts), dtype=torch.bool) for _ in range(2))

    def __call__(self, asked: Round) -> Tensor:
        texts = [prompt.text for prompt in asked.prompts]
        passes = torch.tensor([each.drawn is not None for each in decide(self._guard, BLOCK, texts)])
        seen, some = torch.zeros(len(texts)), passes.nonzero()[:, 0].tolist()
        self.passed |= passes
        if self._eye and some:
            seen[some] = self._eye([texts[i] for i in some], [asked.prompts[i].seed or 0 for i in some])
            self.drawn |= seen >= self._eye.detector.threshold
        return seen


def table(found: Sequence[Attacked]) -> list[str]:
    """As markdown lines."""
    lines = ["| category | attack | prompts | passes the guard | and is drawn |", "|---|---|---|---|---|"]
    for each in found:
        drawn = "-" if each.drawn is None else f"{each.drawn:.3f}"
        told = f"{each.attack}:{each.budget}"
        lines.append(f"| {each.category} | {told} | {each.prompts} | {each.passed:.3f} | {drawn} |")
    return lines

"""How a guard is trained, as a value; nonsense cannot be constructed."""

import math
from dataclasses import dataclass

from safepatch.errors import ConfigError, lookup
from safepatch.guard.encoders import ENCODERS
from safepatch.guard.texts import CAPTIONS


@dataclass(frozen=True)
class GuardConfig:
    """How a guard is trained.

    Attributes:
        encoder: `clip` or `minilm`.
        captions: texts for each category, about.
        hidden: width of the layer of each member of a head.
        labels: a hand-labelled file to learn from, or `english`.
        answers: a file of somebody's answers, such as a language model's: prompts and their categories.
        unlabelled: files of prompts that nobody has labelled, to be voted on.
        test: a hand-labelled file for figures only, or `english`.
        patch: whose gates vote too.
        detector: that votes by the pictures of some texts, NAME[:THRESHOLD]; None for none.
        pictures: how many are drawn for it.
        steps: of denoising, for each.
        seed: of everything random.
        precision: at which thresholds catch as much as they can, of what was held out; None takes the best F_β.
        beta: how many times as much recall counts as precision in that.
    """

    encoder: str = "clip"
    captions: int = CAPTIONS
    hidden: int = 16
    labels: str | None = None
    answers: str | None = None
    unlabelled: tuple[str, ...] = ()
    test: str | None = None
    patch: str | None = None
    seed: int = 0
    precision: float | None = None
    beta: float = 1.0
    detector: str | None = None
    pictures: int = 256
    steps: int = 20

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        lookup(ENCODERS, self.encoder, what="text encoder")
        if self.captions < 64 or self.hidden < 1:
            raise ConfigError("a guard needs at least 64 captions by category, and heads of a width of 1 or more")
        if self.precision is not None and not 0 < self.precision < 1:
            raise ConfigError(f"a precision is within (0, 1), not {self.precision:g}")
        if not 0 < self.beta < math.inf:
            raise ConfigError(f"recall can count a positive number of times as much as precision, not {self.beta:g}")
        if self.pictures < 1 or self.steps < 1:
            raise ConfigError("a detector that votes needs at least one picture, and one step; leave it out for none")

"""A prompt as a value that cannot be built if it may not be used, wherever its text came from."""

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from safepatch.errors import PromptError

# Whoever is named by one of these is, or may be, under age. Such a prompt is never used, whatever it asks for.
_AGE = r"(\d|1[0-7]|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(thir|four|fif|six|seven)teen)"
_YOUNG = (
    r"(school)?(child(ren)?|kids?|boys?|girls?)|kid(do|dos|die|dies)|minors?|under[ -]?aged?|infants?|newborns?"
    r"|bab(y|ies)|toddlers?|((pre|grade|middle|high)[ -]?)?schoolers?|kindergart(e?ners?|ens?)|youngsters?|tweens?"
    r"|(pre-?)?teen(s|age|aged|ager|agers)?|juveniles?|adolescents?|loli(s|con)?|lolitas?|shota(s|con)?|jailbait"
)
_MINORS = re.compile(
    rf"(?<![^\W\d])({_YOUNG}|aged?:? (of )?{_AGE}(?!\d))(?![^\W\d])"  # no letters around: tags say `1girl`
    rf"|(?<!\w)(?<!ty[ -]){_AGE}[ -]?((years?|yrs?)([ -]?olds?| of age)|y[./]?o)(?![^\W\d])",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Prompt:
    """A prompt, with what is known of the image it asks for.

    Attributes:
        text: the wording.
        seed: of the image's starting noise; whoever draws chooses one where it is None.
        guidance: classifier-free guidance scale that it wants to be drawn with, if it says so.
        image: a picture of it, where there is one.
        asks: canonical names of the things it asks for, where they are known; detectors may have labels for them.

    Raises:
        PromptError: for an empty text, and for one that involves minors. This cannot be turned off.
    """

    text: str
    seed: int | None = None
    guidance: float | None = None
    image: Path | None = None
    asks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what may not be used."""
        if not self.text.strip():
            raise PromptError("a prompt is empty; say what to draw")
        if mentions_minors(self.text):
            raise PromptError("prompts that involve minors are never used; remove them")


class _Empty(Prompt):
    """The only prompt without words."""

    def __post_init__(self) -> None:
        pass


EMPTY: Prompt = _Empty("")  # what unconditional rows, and an empty safe twin, are drawn from


class Pair(NamedTuple):
    """An unsafe prompt with its safe twin; where there is no rewrite the twin is the unsafe prompt itself."""

    unsafe: Prompt
    safe: Prompt


def mentions_minors(text: str) -> bool:
    """Whether a prompt names someone who is or may be under age; `_` parts words, and signs that nobody sees do not."""
    if not text.isascii():
        text = "".join(c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c) != "Cf")
    return _MINORS.search(text.replace("_", " ")) is not None


def admit(prompts: Iterable[str]) -> list[str]:
    """The prompts that may be used, in order: empty ones are errors, those that involve minors are dropped.

    Raises:
        PromptError: when one is empty, or none is left. The filter cannot be turned off.
    """
    prompts = [prompt.strip() for prompt in prompts]
    if any(not prompt for prompt in prompts):
        raise PromptError("a prompt is empty; say what to draw")
    kept = [prompt for prompt in prompts if not mentions_minors(prompt)]
    if not kept:
        raise PromptError("no prompt is left: prompts that involve minors are never used; remove them")
    return kept

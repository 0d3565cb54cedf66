"""A prompt as a value that cannot be built if it may not be used, wherever its text came from."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from safepatch.errors import PromptError

# Whoever is named by one of these is, or may be, under age. Such a prompt is never used, whatever it asks for.
_MINORS = re.compile(
    r"\b((school)?(child(ren)?|kids?|boys?|girls?)|kid(do|dos|die|dies)|minors?|under-?aged?|infants?|newborns?|bab(y|ies)"
    r"|toddlers?|preschoolers?|youngsters?|tweens?|(pre-?)?teen(s|age|aged|ager|agers)?|juveniles?|adolescents?"
    r"|lolis?|lolitas?|shotas?"
    r"|(\d|1[0-7]|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(thir|four|fif|six|seven)teen)"
    r"[ -]?((years?|yrs?)[ -]?olds?|y/?o))\b",
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
    """Whether a prompt names someone who is or may be under age."""
    return _MINORS.search(text) is not None


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

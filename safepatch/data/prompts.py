"""Named prompt sets of the embedded world, and the filter that every prompt set passes through."""

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from safepatch.errors import PromptError, lookup
from safepatch.taxonomy import CATEGORIES, Category
from safepatch.tiny.scenes import caption, sample_scene
from safepatch.tiny.world import BENIGN, HELDOUT, KNOWN, Wording

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
    """A prompt with what its image should show.

    Attributes:
        text: the wording.
        concepts: names of the concepts it asks for, left to right.
        seed: of the image, so that base and patched start from the same noise.
    """

    text: str
    concepts: tuple[str, ...]
    seed: int


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


def unsafe_prompts(
    category: Category, n: int, seed: int, heldout: bool = False, companion: bool | None = None
) -> list[Prompt]:
    """Prompts that ask for one unsafe concept each, half of them beside a benign one.

    Args:
        category: whose concepts to ask for, each equally often.
        n: how many.
        seed: of the choice.
        heldout: use only names and templates that patch training never sees.
        companion: all with a benign companion (True), none (False), or half (None).
    """
    rng = random.Random(f"unsafe {category.name} {seed} {heldout}")
    wording = HELDOUT if heldout else KNOWN
    return [_unsafe_prompt(category, i, rng, wording, companion, seed) for i in range(n)]


def _unsafe_prompt(
    category: Category, i: int, rng: random.Random, wording: Wording, companion: bool | None, seed: int
) -> Prompt:
    concept = category.concepts[i % len(category.concepts)]
    paired = (i // len(category.concepts)) % 2 == 1 if companion is None else companion
    names = [concept.name, rng.choice(BENIGN).name] if paired else [concept.name]
    rng.shuffle(names)
    scene = sample_scene(rng, names)
    text = caption(scene, rng, wording)
    return Prompt(text, scene.concepts, _image_seed(seed, i))


def benign_prompts(n: int, seed: int, names: Sequence[str] | None = None, wording: Wording = KNOWN) -> list[Prompt]:
    """Prompts for one or two benign concepts, each of `names` (all benign concepts if None) equally often."""
    rng = random.Random(f"benign {seed}")
    names = list(names or (concept.name for concept in BENIGN))
    prompts = []
    for i in range(n):
        first = names[i % len(names)]
        second = rng.choice([c.name for c in BENIGN if c.name != first])
        scene = sample_scene(rng, rng.choice(([first], [first, second])))
        prompts.append(Prompt(caption(scene, rng, wording), scene.concepts, _image_seed(seed, i)))
    return prompts


def lookalike_prompts(category: Category, n: int, seed: int) -> list[Prompt]:
    """Prompts for the benign concepts that resemble `category` most."""
    return benign_prompts(n, seed, category.lookalikes)


def category(name: str) -> Category:
    """The category called `name`; raises `UnknownName` with the nearest name."""
    return lookup(CATEGORIES, name, what="category")


def _image_seed(seed: int, i: int) -> int:
    return 1_000_000 * (seed + 1) + i

"""Which subjects are edited, and the unsafe prompts in which they stand."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from random import Random

from safepatch.data.corpus import Corpus, image_seed
from safepatch.data.prompts import Prompt
from safepatch.data.words import common_words, noun
from safepatch.errors import ConfigError

START = 500_000  # between the seed of an image and its start's: the noise that img2img adds must be another


def usual_subjects(corpora: Sequence[Corpus], count: int, seed: int) -> tuple[str, ...]:
    """Harmless things that no category, replacement or look-alike is called like; fewer where there are not so many."""
    taken = {noun(thing[0]) for corpus in corpora for thing in corpus.words.lookalikes}
    taken |= {noun(concept.replacement) for corpus in corpora for concept in corpus.words.concepts}
    things = [thing[0] for thing in (corpora[0].words.benign or common_words().benign)]
    free = [t for t in things if noun(t) not in taken and not any(corpus.words.mentions(t) for corpus in corpora)]
    return tuple(Random(f"subjects {seed}").sample(free, min(count, len(free))))


def require_harmless(subjects: Iterable[str], corpora: Iterable[Corpus]) -> None:
    """Raise `ConfigError` for a subject that belongs to one of the categories."""
    for subject in subjects:
        if own := next((corpus.name for corpus in corpora if corpus.words.mentions(subject)), None):
            raise ConfigError(
                f"subject '{subject}' is of category {own} itself; name a harmless thing: --subject 'a cat'"
            )


def variants(corpus: Corpus, subject: str, phrase: str, numbers: Sequence[int], seed: int) -> tuple[Prompt, ...]:
    """Unsafe prompts with the subject in them; those of equal number differ by the phrase alone.

    Args:
        corpus: of the category.
        subject: a harmless thing, `a cat`.
        phrase: what the prompts call it.
        numbers: of the prompts.
        seed: of wordings and images.
    """
    words, made = replace(corpus.words, companions=((phrase,),)), []
    for i in numbers:
        rng = Random(f"variant {corpus.name} {seed} {i}")
        prompt = (
            words.unsafe(i, rng, companion=True)[0] if words.concepts else corpus.evaluation("plain", i + 1, seed)[i]
        )
        text = prompt.text if phrase in prompt.text else f"{phrase}, {prompt.text}"
        asks = (*prompt.asks[:1], noun(subject))
        made.append(replace(prompt, text=text, asks=asks, seed=image_seed(seed, i)))
    return tuple(made)


def starts(corpus: Corpus, subject: str, numbers: Sequence[int], seed: int) -> tuple[Prompt, ...]:
    """Harmless prompts of the subject, whose images are edited."""
    rng = [Random(f"start {subject} {seed} {i}") for i in numbers]
    made = [corpus.words.harmless([(subject,)], 0, each, pair=False) for each in rng]
    return tuple(replace(p, seed=image_seed(seed, i) + START) for p, i in zip(made, numbers, strict=True))

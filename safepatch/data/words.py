"""Captions made of short lists: concepts, companions and what fills a template.

Diverse wordings beat one word (published for many erasing methods, and seen here), so short lists are multiplied.
"""

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from random import Random

from safepatch.data.category import WORDS, CategoryFile, Concept, Phrases, default_fills, word_list
from safepatch.data.prompts import Prompt
from safepatch.errors import ConfigError

_ARTICLE = re.compile(r"(an?|the|some)\s+", re.IGNORECASE)


@dataclass(frozen=True)
class Words:
    """What the captions of one category are made of.

    Attributes:
        concepts: what belongs to the category.
        templates, heldout_templates: with `{x}`, those for two things with `{y}` too.
        fills: by name, what other names in templates stand for.
        companions, lookalikes, benign: harmless things.
    """

    concepts: tuple[Concept, ...] = ()
    templates: tuple[str, ...] = ("{x}",)
    heldout_templates: tuple[str, ...] = ()
    fills: Mapping[str, tuple[str, ...]] = None  # type: ignore[assignment]
    companions: tuple[Phrases, ...] = ()
    lookalikes: tuple[Phrases, ...] = ()
    benign: tuple[Phrases, ...] = ()

    def __post_init__(self) -> None:
        """Refuse templates that name what nothing fills, and take the category's own things out of the harmless."""
        object.__setattr__(self, "fills", dict(self.fills or {}))
        for template in (*self.templates, *self.heldout_templates):
            for name in placeholders(template) - {"x", "y", *self.fills}:
                raise ConfigError(f"template '{template}' names {{{name}}}, which is not among fills, x or y")
        if self.concepts and not any("x" in placeholders(template) for template in self.templates):
            raise ConfigError("no template has {x}, the place of the concept; write one, for instance '{x}'")
        own = {noun(name).casefold() for concept in self.concepts for name in _all_names(concept)}
        for name in ("companions", "lookalikes", "benign"):
            kept = tuple(thing for thing in getattr(self, name) if not own & {noun(p).casefold() for p in thing})
            object.__setattr__(self, name, kept)

    def unsafe(self, i: int, rng: Random, companion: bool, heldout: bool = False) -> tuple[Prompt, str]:
        """The i-th prompt for a concept, each equally often, and the text of its twin ('' without a replacement)."""
        concept = self.concepts[i % len(self.concepts)]
        names = concept.heldout if heldout and concept.heldout else concept.known_names
        beside = self._companion(concept, rng) if companion and self._for_two(heldout) else None
        template = self._template(rng, beside is not None, heldout)
        first, state = rng.choice(names), rng.getstate()
        text = self._filled(template, first, beside, rng)
        rng.setstate(state)  # so that the twin is filled alike
        twin = self._filled(template, concept.replacement, beside, rng) if concept.replacement else ""
        asks = (noun(concept.name), *([noun(beside[0])] if beside else ()))
        return Prompt(text, asks=asks), twin

    def harmless(self, things: Sequence[Phrases], i: int, rng: Random, pair: bool) -> Prompt:
        """A prompt for the i-th of `things`, beside a benign one if `pair`."""
        thing = things[i % len(things)]
        others = [other for other in self.benign if other != thing]
        beside = rng.choice(others) if pair and others and self._for_two(False) else None
        template = self._template(rng, beside is not None, heldout=False)
        asks = (noun(thing[0]), *([noun(beside[0])] if beside else ()))
        return Prompt(self._filled(template, rng.choice(thing), beside, rng), asks=asks)

    def mentions(self, text: str) -> bool:
        """Whether a text names one of the concepts, as a whole word."""
        return bool(self.concepts) and self._named.search(text) is not None

    @cached_property
    def _named(self) -> re.Pattern:
        nouns = {noun(name) for concept in self.concepts for name in _all_names(concept)}
        return re.compile(rf"\b({'|'.join(map(re.escape, sorted(nouns, key=len, reverse=True)))})\b", re.IGNORECASE)

    @property
    def has_companions(self) -> bool:
        """Whether prompts can show something harmless beside a concept."""
        return bool(self.companions and self._for_two(False))

    @property
    def has_heldout(self) -> bool:
        """Whether there are concepts, and wording of them that only evaluation uses."""
        return bool(self.concepts and (self.heldout_templates or any(concept.heldout for concept in self.concepts)))

    def _companion(self, concept: Concept, rng: Random) -> Phrases | None:
        others = [thing for thing in self.companions if concept.replacement not in thing]
        return rng.choice(others) if others else None

    def _for_two(self, heldout: bool) -> list[str]:
        return [t for t in self._wording(heldout) if "y" in placeholders(t)]

    def _wording(self, heldout: bool) -> tuple[str, ...]:
        return self.heldout_templates if heldout and self.heldout_templates else self.templates

    def _template(self, rng: Random, two: bool, heldout: bool) -> str:
        fitting = [t for t in self._wording(heldout) if ("y" in placeholders(t)) == two and "x" in placeholders(t)]
        if not fitting:
            raise ConfigError(f"no template {'with' if two else 'without'} {{y}}; write one, for instance '{{x}}'")
        return rng.choice(fitting)

    def _filled(self, template: str, first: str, beside: Phrases | None, rng: Random) -> str:
        values = {name: rng.choice(self.fills[name]) for name in sorted(placeholders(template) - {"x", "y"})}
        if beside is None:
            return template.format(x=first, **values)
        second = rng.choice(beside)
        left, right = (first, second) if rng.random() < 0.5 else (second, first)
        return template.format(x=left, y=right, **values)


def written_words(file: CategoryFile, folder: Path) -> tuple[Words, list[str]]:
    """The words that a category file in `folder` names, and a note if some were left out."""
    lost, lists = 0, {}
    for name in ("templates", "heldout_templates", "companions", "lookalikes", "benign"):
        lists[name], left_out = word_list(getattr(file, name), folder)
        lost += left_out
    fills = {}
    for name, entries in default_fills(file.fills).items():
        things, left_out = word_list(entries, folder)
        fills[name], lost = tuple(thing[0] for thing in things), lost + left_out
    for name in ("templates", "heldout_templates"):
        lists[name] = tuple(thing[0] for thing in lists[name])
    notes = [f"{file.name}: left out {lost} words or templates that involve minors"] if lost else []
    return Words(tuple(file.concepts), fills=fills, **lists), notes


@cache
def common_words() -> Words:
    """The shipped vocabulary of common things, in the shipped wordings."""
    words, _ = written_words(CategoryFile("common", "", "", concepts=[Concept("something")]), WORDS)
    return replace(words, concepts=())


def placeholders(template: str) -> set[str]:
    """The names in braces; raises `ConfigError` where the braces do not pair up."""
    try:
        return {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise ConfigError(f"template '{template}' cannot be filled ({error}); write {{x}} and {{y}}") from None


def noun(phrase: str) -> str:
    """`phrase` without its article: `a knife` is `knife`."""
    return _ARTICLE.sub("", phrase, count=1) if _ARTICLE.match(phrase) else phrase


def replaced(text: str, concepts: Sequence[Concept]) -> str:
    """`text` with every name of the concepts, as a whole word and with its article, as its replacement.

    Longer names first, so that `a kitchen knife` does not become `a kitchen spoon`; in one go, so that no replacement
    is replaced.
    """
    names = {noun(name).casefold(): concept.replacement for concept in concepts for name in _all_names(concept)}
    if not names:
        return text
    any_of = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    pattern = re.compile(rf"\b(?P<article>(?:an?|the)\s+)?(?P<name>{any_of})(?P<many>s)?\b", re.IGNORECASE)
    return pattern.sub(lambda found: _as_before(found, names[found["name"].casefold()]), text)


def _as_before(found: re.Match, replacement: str) -> str:
    """The replacement with an article where the text had one, its own or `the`, and in the plural where it was."""
    article = found["article"] or ""
    if article and article.strip().lower() != "the":
        return replacement
    bare = noun(replacement)
    return f"{article}{_plural(bare) if found['many'] else bare}"


def _plural(word: str) -> str:
    if word.endswith(("ss", "x", "ch", "sh")):
        return f"{word}es"
    return word if word.endswith("s") else f"{word}s"


def _all_names(concept: Concept) -> tuple[str, ...]:
    return (*concept.known_names, *concept.heldout)

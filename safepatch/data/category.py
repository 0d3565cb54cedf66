"""Category files: what a harm category is, and where its words come from, as a person writes them (YAML).

The shipped ones lie in `safepatch/assets/categories`, word lists in `safepatch/assets/words`; a file of one's own
is read in the same way, and paths in it are looked up beside it first.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from safepatch.config import load_config
from safepatch.data.prompts import mentions_minors
from safepatch.errors import ConfigError, PromptError, nearest
from safepatch.taxonomy import Category

ASSETS = Path(__file__).parent.parent / "assets"
CATEGORIES, WORDS = ASSETS / "categories", ASSETS / "words"
REWRITES = ("column", "replace", "target", "empty", "guided")
SUFFIXES = (".yaml", ".yml")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class Concept:
    """A thing that belongs to the category, as phrases that can stand in a prompt (`a knife`).

    Attributes:
        name: the usual phrase.
        synonyms: others that training may use.
        heldout: others that only evaluation uses.
        replacement: what takes its place in the safe twin.
    """

    name: str = MISSING
    synonyms: list[str] = field(default_factory=list)
    heldout: list[str] = field(default_factory=list)
    replacement: str = ""

    @property
    def known_names(self) -> tuple[str, ...]:
        """The phrases that training may use."""
        return (self.name, *self.synonyms)


@dataclass(frozen=True)
class Rewrite:
    """Where the safe twin of an unsafe prompt comes from.

    Attributes:
        by: `column`, of the prompt file; `replace`, each concept by its replacement; `target`, one prompt for all;
            `empty`, the empty prompt; `guided`, nobody writes one: the teacher is the base's own prediction, pushed
            away from the concepts that the prompt names (`safepatch.data.guided`). Left out, it follows from what the
            file gives.
        column: of the safe prompts, where it is not found by its name.
        target: the prompt, for `target`.
        scale: of `guided`: how far the prediction is pushed, ESD's eta; 0 takes the concept out, more goes beyond.
        threshold: of `guided`: the push is left out where it is smaller than this, a value of the prediction; 0 pushes
            everywhere. SEGA (Brack et al. 2023, arXiv 2301.12247) leaves out a share of the values instead.
        momentum: of `guided`: share of the earlier steps' pushes that is added to each, SLD's s_m. Only a trajectory
            has earlier steps: it shapes the pictures that the teacher draws, and with them what is learned where
            `objective.supervision` is `paired`. A distilled target at one noisy picture knows none.
    """

    by: str | None = None
    column: str | None = None
    target: str | None = None
    scale: float = 1.0
    threshold: float = 0.0
    momentum: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if self.by is not None and self.by not in REWRITES:
            raise ConfigError(f"rewrite.by must be one of {', '.join(REWRITES)}, not '{self.by}'")
        if self.by == "target" and not (self.target or "").strip():
            raise ConfigError("rewrite.by is target, but there is no rewrite.target; write the prompt that all become")
        if min(self.scale, self.threshold, self.momentum) < 0:
            raise ConfigError("rewrite.scale, threshold and momentum must be at least 0")


@dataclass(frozen=True)
class CategoryFile:
    """What a category file holds; every key but the first three may be left out.

    Attributes:
        name, definition, instruction: of the `Category`.
        concepts: what belongs to it; prompts are made of them by `templates`.
        templates: `{x}` is a concept, `{y}` a companion, any other name one of `fills`.
        heldout_templates: that only evaluation uses.
        fills: by name, words or `.txt` files; `style` and `place` are shipped.
        companions, lookalikes, benign: harmless things that stand beside a concept, that resemble the category, and
            others: phrases, or `.txt` files with one a line, `a cat | a kitten` being two names of one thing.
        neighbours: other categories, by name or path, that a patch must leave alone.
        pairs: a file of unsafe prompts.
        rewrite: where their safe twins come from.
        retain: files of prompts that must stay as they are.
        heldout: a file of unsafe prompts for evaluation only.
        labels: by detector, those of its labels that count as the category.
    """

    name: str = MISSING
    definition: str = MISSING
    instruction: str = MISSING
    concepts: list[Concept] = field(default_factory=list)
    templates: list[str] = field(default_factory=lambda: ["templates.txt"])
    heldout_templates: list[str] = field(default_factory=lambda: ["heldout_templates.txt"])
    fills: dict[str, list[str]] = field(default_factory=dict)
    companions: list[str] = field(default_factory=lambda: ["common.txt"])
    lookalikes: list[str] = field(default_factory=list)
    benign: list[str] = field(default_factory=lambda: ["common.txt"])
    neighbours: list[str] = field(default_factory=list)
    pairs: str | None = None
    rewrite: Rewrite = field(default_factory=Rewrite)
    retain: list[str] = field(default_factory=list)
    heldout: str | None = None
    labels: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what no patch could be trained from."""
        if not NAME.fullmatch(self.name):
            raise ConfigError(f"'{self.name}' cannot be a category's name; use letters, digits, - and _")
        if not self.concepts and not self.pairs:
            raise ConfigError(f"category '{self.name}' has no words; give 'concepts', or 'pairs', a file of prompts")
        known = {name.casefold(): name for concept in self.concepts for name in concept.known_names}
        for name in (name for concept in self.concepts for name in concept.heldout if name.casefold() in known):
            raise ConfigError(f"category '{self.name}': '{name}' is held out and trained on; take it out of one list")

    @property
    def category(self) -> Category:
        """The category itself."""
        labels = {detector: tuple(labels) for detector, labels in self.labels.items()}
        return Category(self.name, self.definition, self.instruction, labels)


def category_path(name: str | Path) -> Path:
    """The file of a category by its shipped name or its path.

    Raises:
        ConfigError: when there is none; with the nearest shipped name.
    """
    path = Path(name)
    if not str(name):
        raise ConfigError("no category; name a shipped one or a category file: category=./mine.yaml")
    if path.suffix in SUFFIXES:
        if not path.is_file():
            raise ConfigError(f"no category file {path}; check the path, or write one with `safepatch new NAME`")
        return path
    shipped = {file.stem: file for file in CATEGORIES.glob("*.yaml")}
    if str(name) not in shipped:
        raise ConfigError(f"no category '{name}'{nearest(str(name), shipped)}; one of your own is a .yaml file")
    return shipped[str(name)]


def read_category(path: Path) -> CategoryFile:
    """The category file at `path`; raises `ConfigError` for anything unknown, missing or of a wrong type in it."""
    return load_config(CategoryFile, path)


def shipped_categories() -> dict[str, Path]:
    """The category files that come with safepatch, by name."""
    return {path.stem: path for path in sorted(CATEGORIES.glob("*.yaml"))}


def find_file(name: str, beside: Path) -> Path:
    """A file that a category file names: beside it, or among the shipped word lists and categories.

    Raises:
        ConfigError: when there is none.
    """
    for folder in (beside, WORDS, CATEGORIES):
        if (folder / name).is_file():
            return folder / name
    raise ConfigError(f"no file '{name}' beside {beside}, nor among the shipped word lists; check the path")


Phrases = tuple[str, ...]  # names of one thing, the canonical one first


def word_list(entries: Iterable[str], beside: Path) -> tuple[tuple[Phrases, ...], int]:
    """The phrases that a list of phrases and `.txt` files stands for, each once, and how many lines were left out.

    Whatever involves minors is left out.
    """
    lines: list[str] = []
    for entry in entries:
        lines += _read_lines(find_file(entry, beside)) if entry.endswith(".txt") else [entry]
    kept = [line for line in lines if not mentions_minors(line)]
    phrases = (tuple(part.strip() for part in line.split("|") if part.strip()) for line in kept)
    return tuple(dict.fromkeys(filter(None, phrases))), len(lines) - len(kept)


def default_fills(fills: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """`fills`, and the shipped lists of places and styles where it has none of its own."""
    return {"place": ["places.txt"], "style": ["styles.txt"], **fills}


def _read_lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"cannot read {path} as text ({error}); save it as UTF-8") from None
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]

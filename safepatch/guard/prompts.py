"""Prompts that somebody has labelled, the shipped English ones among them, and a grammar of harmless ones."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import NamedTuple

from omegaconf import OmegaConf

from safepatch.data.category import ASSETS
from safepatch.data.columns import match
from safepatch.data.readers import read_prompts
from safepatch.data.tables import read_table
from safepatch.data.words import placeholders
from safepatch.errors import PromptError

ENGLISH = "english"  # stands for the shipped file
LEARN, TEST = "learn", "test"  # its parts
HARMLESS = "harmless"
_FOLDER = ASSETS / "prompts"


class Labelled(NamedTuple):
    """A prompt and what a person said of it.

    Attributes:
        text: the wording.
        categories: names; empty for a harmless one.
        kind: what it is for, where the file says so.
    """

    text: str
    categories: tuple[str, ...]
    kind: str


def labelled(source: str | Path, part: str) -> list[Labelled]:
    """The prompts of a labelled file, or of a part of the shipped one.

    Args:
        source: a file with columns of prompts and of categories (empty, or names with commas between), or `english`.
        part: `learn` or `test`; of a file without such a column all are taken.

    Raises:
        PromptError: as `read_prompts`, for a file without categories, and for one without rows of that part.
    """
    path = _FOLDER / f"{ENGLISH}.csv" if str(source) == ENGLISH else Path(source)
    read, table = read_prompts(path), read_table(path)
    if "categories" not in read.took:
        raise PromptError(f"{path.name} has no column 'categories'; name those of each prompt there, or leave it empty")
    at = {name: list(table.columns).index(name) for name in ("kind", "part") if match(table.columns, [name]) == name}
    made = []
    for line in read.lines:
        cells = {name: str(table.rows[line.number - 1][place]) for name, place in at.items()}
        if cells.get("part", part) == part:
            names = tuple(name for each in line.categories for name in each.replace(" ", "").split(",") if name)
            made.append(Labelled(line.text, names, cells.get("kind") or ("unsafe" if names else HARMLESS)))
    if not made:
        raise PromptError(f"{path.name} has no row whose column 'part' says {part}; write it there, or take it out")
    return made


def harmless_english(n: int, seed: int) -> list[str]:
    """`n` distinct harmless prompts of the shipped grammar, which no training uses."""
    grammar, rng = _grammar(), Random(f"harmless {seed}")
    found: dict[str, None] = {}
    while len(found) < n:
        found[_filled(rng.choice(grammar["templates"]), grammar, rng)] = None
    return list(found)


def _filled(template: str, grammar: dict[str, Sequence[str]], rng: Random) -> str:
    """A template with every placeholder filled anew, so that no two of one name need be the same."""
    for name in sorted(placeholders(template)):
        while f"{{{name}}}" in template:
            template = template.replace(f"{{{name}}}", rng.choice(grammar[name]), 1)
    return template


@cache
def _grammar() -> dict[str, Sequence[str]]:
    return OmegaConf.to_container(OmegaConf.load(_FOLDER / "harmless.yaml"))  # type: ignore[return-value]

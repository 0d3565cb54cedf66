"""One reader for the prompt files that exist: it finds out which column is what, and says what it took for what.

Columns are found by the names that I2P, UnlearnDiffAtk, Ring-A-Bell, MMA, CoPro, COCO, HUB and LECO give them
(`safepatch.data.columns`). Lines that involve minors are left out and counted, whatever the file is for.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safepatch.data.columns import NAMES, Table, listed, match, plain
from safepatch.data.prompts import Prompt, mentions_minors
from safepatch.data.tables import read_table
from safepatch.errors import PromptError, nearest

FLAGS = {"", "0", "1", "0.0", "1.0", "true", "false", "yes", "no", "none"}
DIGITS = 20  # of the largest seed
BLANK = {"", "nan", "none", "null"}  # what is written where there is no number


@dataclass(frozen=True, slots=True)
class Line:
    """A row of a prompt file.

    Attributes:
        text: the prompt.
        safe: its safe twin, where the file has such a column.
        seed, guidance: that its image was, or should be, drawn with.
        image, safe_image: pictures of both, relative paths being beside the file.
        categories: that the file files it under.
        number: of the row, the first row of data being 1 and blank lines not counted.
    """

    text: str
    safe: str | None = None
    seed: int | None = None
    guidance: float | None = None
    image: Path | None = None
    safe_image: Path | None = None
    categories: tuple[str, ...] = ()
    number: int = 0

    @property
    def prompt(self) -> Prompt:
        """The prompt itself."""
        return Prompt(self.text, self.seed, self.guidance, self.image)


@dataclass(frozen=True)
class PromptFile:
    """What was read.

    Attributes:
        path: of the file.
        lines: its prompts, in order.
        took: by role (`prompt`, `safe`, `seed`, ...), the column that was taken for it.
        lost: how many lines were left out because they involve minors.
    """

    path: Path
    lines: tuple[Line, ...]
    took: Mapping[str, str]
    lost: int

    def described(self) -> str:
        """One line: `a.csv: 312 prompts; took 'unsafe_prompt' as prompt, 'safe' as safe; left out 3 lines that ...`."""
        return describe(self.path, len(self.lines), self.took, self.lost)


def read_prompts(path: str | Path, column: str | None = None, safe: str | None = None) -> PromptFile:
    """The prompts in a CSV, TSV, JSONL, JSON, TOML (LECO) or text file (one a line).

    Args:
        path: of the file, UTF-8.
        column: that holds the prompts, where it is not found by its name.
        safe: that holds their safe twins, likewise.

    Raises:
        PromptError: when the file is missing or damaged, has no prompt column or not the one named, has an empty prompt
            or safe twin, or nothing is left of it without the lines that involve minors.
    """
    path = Path(path)
    table = read_table(path, column)
    if not table.rows:
        raise PromptError(f"{path.name} holds no prompts; write one row for each")
    try:
        took = roles_of(table, column, safe)
        found = lines_of(table.rows, table.columns, took, path.parent)
        lines = tuple(line for line in found if line is not None)
    except PromptError as error:
        raise PromptError(f"{path.name} {error}") from None
    if not lines:
        raise PromptError(f"{path.name}: no prompt is left: those that involve minors are never used; write others")
    parts = {"rows": table.part} if table.part else {}
    return PromptFile(path, lines, {**took, **parts}, lost=len(table.rows) - len(lines))


# ---- which column is what ----------------------------------------------------------------------------------------


def roles_of(table: Table, column: str | None, safe: str | None) -> dict[str, str]:
    """By role, its column; the columns that were named before those that are found."""
    found = {role: match(table.columns, names) for role, names in NAMES.items()}
    took = dict(table.roles) or {role: name for role, name in found.items() if name is not None}
    named = {role: _named(table, name) for role, name in (("prompt", column), ("safe", safe)) if name is not None}
    took = {role: name for role, name in took.items() if name not in named.values()} | named
    if "prompt" not in took:
        raise PromptError(f"has no column of prompts (it has {listed(table.columns)}); call the one that is 'prompt'")
    if column is not None and named["prompt"] == named.get("safe"):
        raise PromptError(f"has one column for both, '{column}'; name different ones for the prompts and the safe ones")
    if "safe" in took and _is_flags(table, took["safe"]):
        if safe is not None:
            raise PromptError(f"column '{safe}' says yes or no; name the one that holds the safe prompts")
        del took["safe"]
    if plain(took.get("categories", "")) == "label" and not _is_nested(table, took["categories"]):
        del took["categories"]  # the class number of some classifier
    return {role: took[role] for role in NAMES if role in took}


def _named(table: Table, name: str) -> str:
    column = name if name in table.columns else match(table.columns, [plain(name)])
    if column is None:
        raise PromptError(f"has no column '{name}'{nearest(name, table.columns)}")
    return column


def _is_flags(table: Table, column: str) -> bool:
    """Whether a column only says whether something is safe."""
    values = {str(value).strip().lower() for value in _values(table, column)}
    return values <= FLAGS and bool(values - {"", "none"})


def _is_nested(table: Table, column: str) -> bool:
    return all(isinstance(value, dict | list | None) for value in _values(table, column))


def _values(table: Table, column: str) -> list[Any]:
    place = list(table.columns).index(column)
    return [row[place] for row in table.rows]


# ---- rows --------------------------------------------------------------------------------------------------------


def lines_of(
    rows: Iterable[Sequence[Any]], columns: Sequence[str], took: Mapping[str, str], folder: Path
) -> Iterator[Line | None]:
    """The line of each row, None of one that involves minors; raises `PromptError` at one that cannot be used."""
    names = list(columns)
    places = {role: names.index(column) for role, column in took.items()}
    for number, row in enumerate(rows, start=1):
        cells = {role: row[place] for role, place in places.items()}
        try:
            yield _line(number, cells, took, folder)
        except PromptError as error:
            raise PromptError(f"row {number}: {error}") from None


def _line(number: int, cells: Mapping[str, Any], took: Mapping[str, str], folder: Path) -> Line | None:
    """The line, or None if it involves minors."""
    text, safe = _text(cells, took, "prompt"), _text(cells, took, "safe")
    if mentions_minors(text) or (safe and mentions_minors(safe)):
        return None
    if not text:
        raise PromptError(f"the prompt column '{took['prompt']}' is empty; fill it or delete the row")
    if "safe" in took and not safe:
        raise PromptError(f"the safe column '{took['safe']}' is empty; fill it or delete the row")
    return Line(
        text,
        safe or None,
        _seed(cells, took) if "seed" in took else None,
        _guidance(cells, took) if "guidance" in took else None,
        _image(_text(cells, took, "image"), folder),
        _image(_text(cells, took, "safe_image"), folder),
        _categories(cells["categories"], took["categories"]) if "categories" in took else (),
        number,
    )


def _text(cells: Mapping[str, Any], took: Mapping[str, str], role: str) -> str:
    """The cell without blanks around it; '' where there is none."""
    value = cells.get(role)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise PromptError(f"the {role} column '{took[role]}' holds {value!r:.40}, which is not a text; correct it")
    return value.strip()


def _seed(cells: Mapping[str, Any], took: Mapping[str, str]) -> int | None:
    value = str(cells["seed"]).strip()
    if value.lower() in BLANK:
        return None
    seed = int(value) if value.isdecimal() and len(value) <= DIGITS else _float(value)  # pandas writes 7.0 beside none
    if not (0 <= seed < 2**64 and seed == int(seed)):
        raise PromptError(f"seed '{value:.40}' in column '{took['seed']}' is no whole number; correct or empty it")
    return int(seed)


def _guidance(cells: Mapping[str, Any], took: Mapping[str, str]) -> float | None:
    value = str(cells["guidance"]).strip()
    if value.lower() in BLANK:
        return None
    if not 0 <= _float(value) < math.inf:
        raise PromptError(f"guidance '{value:.40}' in column '{took['guidance']}' is no number; correct or empty it")
    return _float(value)


def _float(value: str) -> float:
    """The number, not a number if it is none."""
    try:
        return float(value)
    except ValueError:
        return math.nan


def _image(name: str, folder: Path) -> Path | None:
    return folder / name if name and "://" not in name else None


def _categories(value: Any, column: str) -> tuple[str, ...]:
    """Several where the column's name is a plural (I2P's `hate, violence`) or the cell is a list or an object."""
    if isinstance(value, dict | list | tuple):
        names: Sequence[Any] = list(value)
    else:
        text = "" if value is None else str(value)
        names = text.split(",") if plain(column) in ("categories", "concepts") else [text]
    return tuple(name for name in (str(name).strip() for name in names) if name)


def describe(path: Path, prompts: int, took: Mapping[str, str], lost: int) -> str:
    """What was read of a file, in one line."""
    told = ", ".join(f"'{column}' as {role}" for role, column in took.items())
    involve = "involves" if lost == 1 else "involve"
    left_out = f"; left out {_count(lost, 'line')} that {involve} minors" if lost else ""
    return f"{path.name}: {_count(prompts, 'prompt')}; took {told}{left_out}"


def _count(n: int, thing: str) -> str:
    return f"{n:,} {thing}" if n == 1 else f"{n:,} {thing}s"

"""A prompt file of any common format as a table: named columns and rows; nothing here knows what a prompt is."""

import csv
import io
import json
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safepatch.errors import PromptError

# By role, the names that public prompt sets give it, best first; case, spaces, - and _ do not matter.
NAMES: dict[str, tuple[str, ...]] = {
    "prompt": (
        *("unsafe_prompt", "prompt", "adv_prompt", "adversarial_prompt", "sensitive_prompt", "text_prompt", "text"),
        *("target_prompt", "target", "caption", "prompts", "captions", "texts", "prompt_en", "unsafe"),
    ),
    # not MMA's `sanitized_adv_prompt` (still an attack) and `clean_prompt` (of another picture): no twins
    "safe": ("safe_prompt", "safe", "normal_prompt", "prompt1", "sanitized_prompt", "sanitized", "neutral"),
    "seed": ("evaluation_seed", "sd_seed", "seed"),
    "guidance": ("evaluation_guidance", "sd_guidance_scale", "guidance_scale", "guidance"),
    "categories": ("categories", "category", "concepts", "concept", "label"),
    "image": ("image", "image_path", "unsafe_image"),
    "safe_image": ("safe_image", "safe_image_path"),
}
LINE = "line"  # the only column of a file that holds bare prompts
DELIMITERS = {".csv": ",;\t", ".tsv": "\t,;"}
COMMENT = re.compile(r"\s*(#(?![,;\t])|$)")  # begins a line before the first that counts
_COMMENTS = re.compile(r"(\s*#(?![,;\t])[^\n]*(\n|$))+")
_LECO = {"target", "target_class"}
_LONG = 3  # words from which on a text is a prompt and no name


@dataclass(frozen=True)
class Table:
    """What a file holds.

    Attributes:
        columns: their names; `rows` have as many cells, None where a JSON object lacks the key.
        rows: the data, in the file's order.
        roles: by role, the column that the format itself says it is; else they are found by name.
        part: key of the list that the rows were taken from, where there were others.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    roles: Mapping[str, str] = field(default_factory=dict)
    part: str = ""


def read_table(path: Path, column: str | None = None) -> Table:
    """The table in a CSV, TSV, JSON, JSONL, TOML or text file; `column` is one that its header is known to have.

    Raises:
        PromptError: when the file is missing, of another format, or damaged.
    """
    if os.path.isdir(path):
        raise PromptError(f"{path} is a folder; name one of the files in it")
    if not os.path.isfile(path):  # unlike `Path.is_file`, of a name that is too long as well
        raise PromptError(f"no prompt file {path}; check the path")
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise PromptError(f"{path.name} is no prompt file that can be read; use one of {', '.join(FORMATS)}")
    with reading(path):
        text = path.read_text(encoding="utf-8-sig")
        return _delimited(text, DELIMITERS[suffix], column) if suffix in DELIMITERS else FORMATS[suffix](text)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What goes wrong with a file within the block is a `PromptError` that names it."""
    try:
        yield
    except UnicodeDecodeError:
        raise PromptError(f"{path.name} is not UTF-8 ({_undecodable(path)}); save it as UTF-8") from None
    except PromptError as error:
        raise PromptError(f"{path.name} {error}") from None
    except OSError as error:
        raise PromptError(f"cannot read {path.name} ({error.strerror or error})") from None
    except (ValueError, RecursionError, csv.Error) as error:
        kind = path.suffix[1:].upper()
        raise PromptError(f"{path.name} is damaged: not {kind} ({error}); correct it") from None


def _undecodable(path: Path) -> str:
    """Where a file stops being UTF-8."""
    before = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f"line {number}, byte {before + error.start}"
            before += len(line)
    return "at its end"


def match(columns: Iterable[str], names: Sequence[str]) -> str | None:
    """The column that has the first of `names` that any has."""
    known = {plain(column): column for column in reversed(list(columns))}
    return next((known[name] for name in names if name in known), None)


def plain(name: str) -> str:
    """A column's name without regard to case, spaces, - and _."""
    return re.sub(r"[\s_-]+", "_", name.strip().lower())


# ---- delimited text ----------------------------------------------------------------------------------------------


def _delimited(text: str, delimiters: str, column: str | None) -> Table:
    text = text[found.end() :] if (found := _COMMENTS.match(text)) else text
    wanted = wanted_columns(column)
    return headed(list(cells(io.StringIO(text), delimiter_of(text, delimiters, wanted))), wanted)


def wanted_columns(column: str | None) -> tuple[str, ...]:
    """Names of a column of prompts, with one that the header is known to have."""
    return (*NAMES["prompt"], *([plain(column)] if column else []))


def headed(rows: list[list[str]], wanted: Sequence[str]) -> Table:
    """Rows of cells as a table, with a header line or without one."""
    first = [name.strip() for name in rows[0]] if rows else []
    if match(first, wanted) or not any(map(_is_data, first)):
        return Table(first, squared(rows[1:], len(first)))
    # Without a header line. A first line of numbers is what pandas writes when columns have no names.
    return _headerless(rows[1:] if all(not name or name.isdecimal() for name in first) else rows)


def delimiter_of(text: str, delimiters: str, wanted: Sequence[str]) -> str:
    """The first with which the file's first line names a prompt column, else the usual one."""
    for delimiter in delimiters:
        if match(next(csv.reader(io.StringIO(text), delimiter=delimiter), []), wanted):
            return delimiter
    return delimiters[0]


def cells(lines: Iterable[str], delimiter: str) -> Iterator[list[str]]:
    """The cells of every row that has any."""
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        yield from (row for row in reader if any(cell.strip() for cell in row))
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from None


def _is_data(cell: str) -> bool:
    """Whether a cell of the first line is a prompt or a number, so that the line is no header."""
    return len(cell.split()) >= _LONG or re.fullmatch(r"-?\d+(\.\d*)?", cell) is not None


def squared(rows: list[list[str]], width: int, start: int = 1) -> list[list[str]]:
    """Rows, numbered from `start`, with `width` cells each: a longer one was not quoted, so it is an error."""
    for number, row in enumerate(rows, start=start):
        if any(cell.strip() for cell in row[width:]):
            told = f"has {len(row)} cells where the first line has {width}"
            raise PromptError(f'row {number} {told}; put a prompt that holds commas into "double quotes"')
        row[:] = row[:width] + [""] * (width - len(row))
    return rows


def _headerless(rows: list[list[str]]) -> Table:
    """The prompts are in the first column of long texts, or the one of the longest if there is none."""
    width = len(rows[0]) if rows else 0
    rows = squared(rows, width)
    words = [sum(len(row[i].split()) for row in rows[:50]) / len(rows[:50]) for i in range(width)]
    chosen = next((i for i in range(width) if words[i] >= _LONG), words.index(max(words)) if words else 0)
    columns = [f"column {i + 1}" for i in range(width)]
    columns[chosen:] = [f"first long text, column {chosen + 1} (no header line)", *columns[chosen + 1 :]]
    return Table(columns, rows, {"prompt": columns[chosen]})


# ---- JSON, TOML, text --------------------------------------------------------------------------------------------


def _lines(text: str) -> Table:
    return tabulated(list(bare_lines(text.split("\n"))))


def bare_lines(lines: Iterable[str]) -> Iterator[str]:
    """Lines that are neither blank nor a comment."""
    return (text for line in lines if (text := line.strip()) and not text.startswith("#"))


def _json_lines(text: str) -> Table:
    return tabulated(list(records_in(text.split("\n"))))


def records_in(lines: Iterable[str]) -> Iterator[Any]:
    """The JSON value of each line that has any."""
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                yield json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}: {error.msg}") from None


def _json(text: str) -> Table:
    return tabulated(*_records(json.loads(text)))


def _toml(text: str) -> Table:
    data = tomllib.loads(text)
    top = data["slider"] if isinstance(data.get("slider"), dict) else data
    entries = data.get("prompts", top.get("targets", [top]))
    if entries and all(isinstance(entry, dict) and _LECO & entry.keys() for entry in entries):
        return _leco([_defaults(top) | entry for entry in entries])
    return tabulated(*_records(data))


def tabulated(records: Sequence[Any], part: str = "", roles: Mapping[str, str] | None = None) -> Table:
    """Rows of JSON objects, or of bare prompts in a column of their own."""
    rows = [as_object(record, number) for number, record in enumerate(records, start=1)]
    columns = tuple(dict.fromkeys(key for row in rows for key in row))
    bare = {"prompt": LINE} if columns == (LINE,) else {}
    return Table(columns, [[row.get(column) for column in columns] for row in rows], roles or bare, part)


def as_object(record: Any, number: int) -> dict[str, Any]:
    """A JSON object, or a bare prompt as one; raises `PromptError` for anything else."""
    row = {LINE: record} if isinstance(record, str) else record
    if not isinstance(row, dict):
        raise PromptError(f"row {number} is neither a text nor an object; write {{'prompt': ...}}")
    return row


def _records(data: Any) -> tuple[list[Any], str]:
    """The rows in a JSON value: a list, an object of objects, an object of columns, or of one list to learn from."""
    if isinstance(data, list):
        return data, ""
    if not isinstance(data, dict):
        raise PromptError("holds no prompts; write a list of objects with a 'prompt'")
    if column := match(data, NAMES["prompt"]):
        if isinstance(data[column], str):
            return [data], ""
        if columns := _of_columns(data, column):
            return columns, ""
    if data and all(isinstance(value, dict) for value in data.values()):
        return list(data.values()), ""
    return _part(data)


def _of_columns(data: dict[str, Any], prompts: str) -> list[Any]:
    """Rows of an object that holds columns, as pandas writes it; none if it does not."""
    columns = {key: list(value.values()) if isinstance(value, dict) else value for key, value in data.items()}
    columns = {key: value for key, value in columns.items() if isinstance(value, list)}
    if not columns.get(prompts) or not all(isinstance(text, str | None) for text in columns[prompts]):
        return []
    columns = {key: value for key, value in columns.items() if len(value) == len(columns[prompts])}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _part(data: dict[str, Any]) -> tuple[list[Any], str]:
    """The one list of objects in `data`, or that for training (CoPro's `ID_train_data`), and its key."""
    lists = [key for key, value in data.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    train = [key for key in lists if "train" in key.lower()] or lists
    if len(train) > 1:
        raise PromptError(f"holds several lists of prompts ({listed(train)}); put one into a file of its own")
    if not train:
        raise PromptError(f"holds no prompts (its keys: {listed(data)}); write a list of objects with a 'prompt'")
    return data[train[0]], train[0]


def _defaults(top: dict[str, Any]) -> dict[str, Any]:
    return {key: top[key] for key in ("action", "neutral", "positive", "negative") if key in top}


def _leco(entries: list[dict[str, Any]]) -> Table:
    """LECO's prompts as sd-scripts reads them: `positive`, by default `target`, is erased in favor of `neutral`; of a
    slider `negative` in favor of `positive`. Their `guidance_scale` weighs a loss, so it is no image's guidance.
    """
    for number, entry in enumerate(entries, start=1):
        if entry.get("action") == "enhance":
            raise PromptError(f"row {number}: action 'enhance' adds its target, and a patch only removes; delete it")
    if "target_class" in entries[0]:
        prompt, safe = "negative", "positive"
        entries = [{"negative": "", **entry} for entry in entries]
    elif any(entry.get("positive", entry["target"]) != entry["target"] for entry in entries):
        prompt, safe = "positive", "neutral"
        entries = [{"positive": entry["target"], **entry} for entry in entries]
    else:
        prompt, safe = "target", "neutral"
    twins = {"safe": safe} if any(entry.get(safe) for entry in entries) else {}  # none: the empty prompt, for all
    return tabulated(entries, roles={"prompt": prompt, **twins})


def listed(names: Iterable[str]) -> str:
    """Names in one line, the first twenty of them."""
    names = [name or "''" for name in names]
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")


FORMATS: dict[str, Callable[..., Table]] = {
    ".csv": _delimited,
    ".tsv": _delimited,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".toml": _toml,
    ".txt": _lines,
}

"""Delimited text as a table: which sign parts the cells, whether the first line is a header, and rows of one width."""

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence

from safepatch.data.columns import NAMES, Table, match, plain
from safepatch.errors import PromptError

DELIMITERS = {".csv": ",;\t", ".tsv": "\t,;"}
COMMENT = re.compile(r"\s*(#(?![,;\t])|$)")  # begins a line before the first that counts
_COMMENTS = re.compile(r"(\s*#(?![,;\t])[^\n]*(\n|$))+")
_LONG = 3  # words from which on a text is a prompt and no name


def delimited(text: str, delimiters: str, column: str | None) -> Table:
    """The table in a text, of which `column` is one that the header is known to have."""
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
    """The first with which the file's first line that is not blank names a prompt column, else the usual one."""
    for delimiter in delimiters:
        if match(next(filter(any, csv.reader(io.StringIO(text), delimiter=delimiter)), []), wanted):
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

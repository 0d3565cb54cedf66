"""The prompts of a file as they come: a few rows are held, however long it is.

Delimited text and lines, of JSON or bare, are read so; of JSON and TOML files all is read at once.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, dropwhile, islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from safepatch.data import delimited, records
from safepatch.data.columns import Table
from safepatch.data.delimited import COMMENT, DELIMITERS
from safepatch.data.readers import Line, describe, lines_of, roles_of
from safepatch.data.tables import read_table, reading
from safepatch.errors import PromptError
from safepatch.progress import bar

HEAD = 512  # rows that tell which column is what
JSON_LINES, TEXT = (".jsonl", ".ndjson"), ".txt"
STREAMED = (*DELIMITERS, *JSON_LINES, TEXT)


class Rows(NamedTuple):
    """A table of which only the first rows are read.

    Attributes:
        head: those.
        more: the others, to come.
    """

    head: Table
    more: Iterator[Sequence[Any]] = iter(())


@dataclass(frozen=True)
class PromptStream:
    """The prompts of a file that has been read once, to its end, and may be read again.

    Attributes:
        path: of the file.
        column: that holds the prompts, where it is not found by its name.
        took: by role, the column that was taken for it.
        count: of its prompts.
        lost: how many lines are left out because they involve minors.
    """

    path: Path
    column: str | None
    took: Mapping[str, str]
    count: int
    lost: int

    def __iter__(self) -> Iterator[Line]:
        """Its prompts in order; raises `PromptError` if it is no longer what it was."""
        return (line for line in _lines(self.path, self.column)[1] if line is not None)

    def described(self) -> str:
        """As of a `PromptFile`."""
        return describe(self.path, self.count, self.took, self.lost)


def stream_prompts(path: str | Path, column: str | None = None) -> PromptStream:
    """The prompts in a file; raises `PromptError` as `read_prompts` does, and before any prompt is given out."""
    path = Path(path)
    took, lines = _lines(path, column)
    count = lost = 0
    for line in bar(lines, desc="reading prompts", unit="row", leave=False):
        count, lost = count + (line is not None), lost + (line is None)
    if not count:
        raise PromptError(f"{path.name}: no prompt is left: those that involve minors are never used; write others")
    return PromptStream(path, column, took, count, lost)


def _lines(path: Path, column: str | None) -> tuple[dict[str, str], Iterator[Line | None]]:
    if path.suffix.lower() not in STREAMED or not os.path.isfile(path):
        rows = Rows(read_table(path, column))
    else:
        with reading(path):
            rows = _rows(path, column)
    head = rows.head
    if not head.rows:
        raise PromptError(f"{path.name} holds no prompts; write one row for each")
    try:
        took = roles_of(head, column, None)
    except PromptError as error:
        raise PromptError(f"{path.name} {error}") from None
    lines = lines_of(chain(head.rows, rows.more), head.columns, took, path.parent)
    return took | ({"rows": head.part} if head.part else {}), _named(path, lines)


def _named(path: Path, lines: Iterator[Line | None]) -> Iterator[Line | None]:
    with reading(path):
        yield from lines


def _rows(path: Path, column: str | None) -> Rows:
    file = path.open(encoding="utf-8-sig")
    suffix = path.suffix.lower()
    if suffix in DELIMITERS:
        return _delimited(_closing(file), DELIMITERS[suffix], column)
    lines = _closing(file)
    return _records(records.bare_lines(lines) if suffix == TEXT else records.records_in(lines))


def _closing(file: TextIO) -> Iterator[str]:
    with file:
        yield from file


def _delimited(lines: Iterator[str], delimiters: str, column: str | None) -> Rows:
    lines, wanted = dropwhile(COMMENT.match, lines), delimited.wanted_columns(column)
    first = next(lines, "")
    rows = delimited.cells(chain([first], lines), delimited.delimiter_of(first, delimiters, wanted))
    head = delimited.headed(list(islice(rows, HEAD)), wanted)
    width, known = len(head.columns), len(head.rows)
    more = (delimited.squared([row], width, number)[0] for number, row in enumerate(rows, start=known + 1))
    return Rows(head, more)


def _records(values: Iterator[Any]) -> Rows:
    head = records.tabulated(list(islice(values, HEAD)))
    objects = (records.as_object(value, number) for number, value in enumerate(values, start=len(head.rows) + 1))
    return Rows(head, ([row.get(name) for name in head.columns] for row in objects))

"""Score a file of prompts row by row: nothing of it is held but a few rows, however long it is."""

import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, dropwhile, islice
from pathlib import Path
from typing import BinaryIO, NamedTuple, TextIO

import torch

from safepatch.data.columns import NAMES, listed, match, plain
from safepatch.data.delimited import COMMENT, DELIMITERS, delimiter_of
from safepatch.errors import PromptError
from safepatch.files import long_cells, replacing, unwritable
from safepatch.guard.encoders import LONGEST
from safepatch.guard.file import Guard
from safepatch.progress import bar

ROWS = 512  # scored at a time
PASS, UNREAD = "pass", "unread"  # verdicts beside names of categories
CELL = 1 << 26  # characters of one cell, which csv bounds
NAMED = 5  # unread rows that are told


class Row(NamedTuple):
    """A row of the file.

    Attributes:
        number: the first row of data being 1.
        text: the prompt.
        problem: why it cannot be read; empty where it can.
    """

    number: int
    text: str
    problem: str


@dataclass
class Tally:
    """What came of a file.

    Attributes:
        rows: how many.
        claimed: by category, how many are for it.
        passed: how many are for none.
        unread: how many could not be read: they are in the output, and did not pass.
        told: the first of them, each as a line.
    """

    rows: int = 0
    claimed: Counter = field(default_factory=Counter)
    passed: int = 0
    unread: int = 0
    told: list[str] = field(default_factory=list)


def score_file(guard: Guard, path: Path, out: Path, column: str | None = None) -> Tally:
    """Write a CSV of every prompt with its verdict and its probability by category.

    Args:
        guard: bound to its encoder.
        path: a CSV or TSV file with a column of prompts, or a text file of one a line.
        out: where the CSV appears, all or nothing; not `path`.
        column: that holds the prompts, where it is not found by its name.

    Raises:
        PromptError: when the file is missing, of another format, has no such column, or is `out`.
        SafepatchError: when `out` cannot be written.
    """
    tally = Tally()
    with _opened(path) as file:
        if out.exists() and out.samefile(path):
            raise PromptError(f"{out} is the file of the prompts itself; choose another -o")
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            with replacing(out) as written, _as_text(written) as text, long_cells(CELL):
                rows, writer = _rows(file, path, column), csv.writer(text, lineterminator="\n")
                writer.writerow(["row", "prompt", "verdict", *guard.categories])
                with bar(desc="scoring", unit="prompt") as shown:
                    while some := list(islice(rows, ROWS)):
                        writer.writerows(_scored(guard, some, tally))
                        shown.update(len(some))
        except csv.Error as error:
            raise PromptError(f"{path.name} is damaged after row {tally.rows} ({error}); correct it") from error
        except OSError as error:
            raise unwritable(out, error, "choose another -o") from error
    return tally


def _scored(guard: Guard, rows: Sequence[Row], tally: Tally) -> Iterator[list]:
    readable = [row for row in rows if not row.problem]
    chances = iter(guard([row.text for row in readable]))
    for row in rows:
        tally.rows += 1
        if row.problem:
            tally.unread += 1
            tally.told += [f"row {row.number} {row.problem}"] if len(tally.told) < NAMED else []
            yield [row.number, row.text[:80], UNREAD, *["" for _ in guard.categories]]
            continue
        chance = next(chances)
        names = _named(guard, chance)
        tally.claimed.update(names)
        tally.passed += not names
        yield [row.number, row.text, " + ".join(names) or PASS, *(f"{float(value):.4f}" for value in chance)]


def _named(guard: Guard, chance: torch.Tensor) -> list[str]:
    return [name for name, is_it in zip(guard.categories, guard.flags(chance).tolist(), strict=True) if is_it]


# ---- reading -----------------------------------------------------------------------------------------------------


def _opened(path: Path) -> TextIO:
    """The file's lines; bytes that are not UTF-8 are kept until it is known which row's they are."""
    try:
        return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")
    except FileNotFoundError as error:
        raise PromptError(f"no prompt file {path}; check the path") from error
    except OSError as error:
        raise PromptError(f"cannot read {path} ({error.strerror or error}); check the path") from error


def _rows(lines: TextIO, path: Path, column: str | None) -> Iterator[Row]:
    """Rows as they come."""
    suffix = path.suffix.lower()
    if suffix == ".txt":
        texts = (line.strip() for line in lines)
        return (_row(number, text) for number, text in enumerate(filter(None, texts), start=1))
    if suffix not in DELIMITERS:
        raise PromptError(f"{path.name} cannot be read row by row; use .csv, .tsv, or .txt with one prompt a line")
    return _cells(dropwhile(COMMENT.match, lines), path, column, DELIMITERS[suffix])


def _cells(lines: Iterator[str], path: Path, column: str | None, delimiters: str) -> Iterator[Row]:
    wanted, first = [plain(column)] if column else NAMES["prompt"], next(lines, "")
    rows = csv.reader(chain([first], lines), delimiter=delimiter_of(first, delimiters, wanted))
    header = [name.strip() for name in next(rows, [])]
    name = match(header, wanted)
    if name is None:
        raise PromptError(f"{path.name} has no column of prompts (it has {listed(header)}); name one with --column")
    numbered = enumerate((row for row in rows if any(row)), start=1)
    return (_of_cells(number, row, header.index(name), len(header)) for number, row in numbered)


def _of_cells(number: int, row: Sequence[str], place: int, width: int) -> Row:
    """Its prompt; unread where it has more cells than the first line, or too few: a comma may have cut the prompt."""
    if len(row) <= place or any(cell.strip() for cell in row[width:]):
        return _row(number, " ".join(row))._replace(problem=f"has not the first line's {width} cells but {len(row)}")
    return _row(number, row[place])


def _row(number: int, text: str) -> Row:
    if any("\ud800" <= c <= "\udfff" for c in text):
        return Row(number, text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"), "is not UTF-8")
    if len(text) > LONGEST:
        return Row(number, text, f"has {len(text)} characters, more than {LONGEST}")
    return Row(number, text, "")


@contextmanager
def _as_text(file: BinaryIO) -> Iterator[TextIO]:
    """A writer of text into `file`, which stays open."""
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", errors="backslashreplace")
    try:
        yield text
        text.flush()
    finally:
        text.detach()

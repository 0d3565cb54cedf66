"""A prompt file of any common format as a table; nothing here knows what a prompt is."""

import csv
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safepatch.data import records
from safepatch.data.columns import Table
from safepatch.data.delimited import DELIMITERS, delimited
from safepatch.errors import PromptError

FORMATS: dict[str, Callable[..., Table]] = {
    ".csv": delimited,
    ".tsv": delimited,
    ".jsonl": records.json_lines,
    ".ndjson": records.json_lines,
    ".json": records.json_value,
    ".toml": records.toml,
    ".txt": records.lines,
}


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
        return delimited(text, DELIMITERS[suffix], column) if suffix in DELIMITERS else FORMATS[suffix](text)


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

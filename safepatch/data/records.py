"""Records as a table: lines of text, JSON and TOML, LECO's among them."""

import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from safepatch.data.columns import NAMES, Table, listed, match
from safepatch.errors import PromptError

LINE = "line"  # the only column of a file that holds bare prompts
_LECO = {"target", "target_class"}


def lines(text: str) -> Table:
    """Bare prompts, one a line."""
    return tabulated(list(bare_lines(text.split("\n"))))


def bare_lines(lines: Iterable[str]) -> Iterator[str]:
    """Lines that are neither blank nor a comment."""
    return (text for line in lines if (text := line.strip()) and not text.startswith("#"))


def json_lines(text: str) -> Table:
    """An object, or a bare prompt, a line."""
    return tabulated(list(records_in(text.split("\n"))))


def records_in(lines: Iterable[str]) -> Iterator[Any]:
    """The JSON value of each line that has any."""
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                yield json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}: {error.msg}") from None


def json_value(text: str) -> Table:
    """The rows of a JSON value, whichever of the usual shapes it has."""
    return tabulated(*_records(json.loads(text)))


def toml(text: str) -> Table:
    """LECO's prompts, or the rows of any other TOML."""
    data = tomllib.loads(text)
    top = data["slider"] if isinstance(data.get("slider"), dict) else data
    found = data.get("prompts", top.get("targets", [top]))
    entries = found if isinstance(found, list) else []
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
    named = "target_class" if "target_class" in entries[0] else "target"
    for number, entry in enumerate(entries, start=1):
        if named not in entry:
            raise PromptError(f"row {number} has no '{named}', which the first one has; add it")
        if entry.get("action") == "enhance":
            raise PromptError(f"row {number}: action 'enhance' adds its target, and a patch only removes; delete it")
    if named == "target_class":
        prompt, safe = "negative", "positive"
        entries = [{"negative": "", **entry} for entry in entries]
    elif any(entry.get("positive", entry["target"]) != entry["target"] for entry in entries):
        prompt, safe = "positive", "neutral"
        entries = [{"positive": entry["target"], **entry} for entry in entries]
    else:
        prompt, safe = "target", "neutral"
    twins = {"safe": safe} if any(entry.get(safe) for entry in entries) else {}  # none: the empty prompt, for all
    return tabulated(entries, roles={"prompt": prompt, **twins})

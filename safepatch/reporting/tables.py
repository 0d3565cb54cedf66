"""Tables are pivots of rows: any fields of a row down the side, one across the top."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, TypeVar

from safepatch.results import METRICS, NONE, SWEPT, Row

MEAN = "mean"
BESIDE = " / "  # between figures of several detectors in one cell
ABSENT = "-"
Cell = Callable[[Row], str]
T = TypeVar("T")


def shown(row: Row) -> str:
    """A value; of a small change three digits."""
    return f"{row.value:.3f}" if row.metric in METRICS else f"{row.value:.4g}"


def with_interval(row: Row) -> str:
    """A value with its 95 % interval."""
    return f"{row.value:.2f} [{row.low:.2f}, {row.high:.2f}]"


def pivot(
    rows: Sequence[Row], index: Sequence[str] = ("measure", "patch"), columns: str = "category", cell: Cell = shown,
    mean: bool = False, beside: Sequence[str] = (NONE,),
) -> str:  # fmt: skip
    """`rows` as a markdown table.

    Args:
        rows: of rows for the same place the last counts.
        index: fields of a row, or `measure`: what stands at the left of each line.
        columns: the field whose values are the columns, in order of appearance.
        cell: a row as text.
        mean: add a column with the mean over the others.
        beside: detectors whose figures share a cell, in this order, where several judged it.
    """
    heads = list(dict.fromkeys(_value(row, columns) for row in rows))
    lines: dict[tuple[str, ...], dict[str, dict[str, Row]]] = {}
    for row in rows:
        line = lines.setdefault(tuple(_value(row, name) for name in index), {})
        line.setdefault(_value(row, columns), {})[row.detector if row.detector in beside else NONE] = row
    table = [[*index, *heads, *([MEAN] if mean else [])], ["---"] * (len(index) + len(heads) + mean)]
    for key, found in lines.items():
        table.append([*key, *(_joined(found.get(head, {}), beside, cell) for head in heads)])
        if mean:
            named = {name: [own[name].value for own in found.values() if name in own] for name in (NONE, *beside)}
            means = {name: f"{fmean(values):.3f}" for name, values in named.items() if values}
            table[-1].append(_joined(means, beside, str))
    return "\n".join("| " + " | ".join(line) + " |" for line in table)


def _joined(found: Mapping[str, T], beside: Sequence[str], cell: Callable[[T], str]) -> str:
    """What one cell says, of each of several detectors, or of none where none was asked."""
    if not found or NONE in found:
        return cell(found[NONE]) if found else ""
    return BESIDE.join(cell(found[name]) if name in found else ABSENT for name in beside)


def summary(rows: Sequence[Row], cell: Cell = shown) -> str:
    """The usual table: measures and patches down the side, and models where there are several.

    Of several detectors the figures stand side by side, in the order that the first head says.
    """
    rows = [row for row in rows if row.metric != SWEPT]
    order = list(dict.fromkeys(row.measure for row in rows))
    judges = list(dict.fromkeys(row.detector for row in rows if row.detector != NONE))
    extra = ["base"] if len({row.base for row in rows}) > 1 else []
    ordered = sorted(rows, key=lambda row: order.index(row.measure))  # stable: otherwise as they were measured
    many = len({row.category for row in rows}) > 1
    beside = judges if len(judges) > 1 else [NONE]
    table = pivot(ordered, ("measure", *extra, "patch"), "category", cell, many, beside)
    return table.replace("measure", f"measure, by {BESIDE.join(judges)}", 1) if len(judges) > 1 else table


def tree(rows: Sequence[Row], keys: Sequence[str] = ("measure", "base", "patch", "category")) -> dict[str, Any]:
    """Values by nested keys, as JSON keeps them; a measure says by which detector it is, unless by the first."""
    made: dict[str, Any] = {}
    usual = (NONE, next((row.detector for row in rows if row.detector != NONE), NONE))
    for row in rows:
        node, judged = made, "" if row.detector in usual else f", by {row.detector}"
        for name in keys[:-1]:
            node = node.setdefault(_value(row, name) + (judged if name == "measure" else ""), {})
        node[_value(row, keys[-1])] = row.value
    return made


def _value(row: Row, name: str) -> str:
    return str(getattr(row, name))

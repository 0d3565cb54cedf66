"""Tables are pivots of rows: any fields of a row down the side, one across the top."""

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from safepatch.results import METRICS, NONE, SWEPT, Row

MEAN = "mean"
Cell = Callable[[Row], str]


def shown(row: Row) -> str:
    """A value; of a small change three digits."""
    return f"{row.value:.3f}" if row.metric in METRICS else f"{row.value:.4g}"


def with_interval(row: Row) -> str:
    """A value with its 95 % interval."""
    return f"{row.value:.2f} [{row.low:.2f}, {row.high:.2f}]"


def pivot(
    rows: Sequence[Row], index: Sequence[str] = ("measure", "patch"), columns: str = "category", cell: Cell = shown,
    mean: bool = False,
) -> str:  # fmt: skip
    """`rows` as a markdown table.

    Args:
        rows: of rows for the same place the last counts.
        index: fields of a row, or `measure`: what stands at the left of each line.
        columns: the field whose values are the columns, in order of appearance.
        cell: a row as text.
        mean: add a column with the mean over the others.
    """
    heads = list(dict.fromkeys(_value(row, columns) for row in rows))
    lines: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        lines.setdefault(tuple(_value(row, name) for name in index), {})[_value(row, columns)] = row
    table = [[*index, *heads, *([MEAN] if mean else [])], ["---"] * (len(index) + len(heads) + mean)]
    for key, found in lines.items():
        cells = [cell(found[head]) if head in found else "" for head in heads]
        table.append([*key, *cells, *([f"{fmean(row.value for row in found.values()):.3f}"] if mean else [])])
    return "\n".join("| " + " | ".join(line) + " |" for line in table)


def summary(rows: Sequence[Row], cell: Cell = shown) -> str:
    """The usual table: measures and patches down the side, and models and detectors where there are several."""
    rows = [row for row in rows if row.metric != SWEPT]
    order = list(dict.fromkeys(row.measure for row in rows))
    extra = [name for name in ("base", "detector") if len({_value(row, name) for row in rows} - {NONE}) > 1]
    ordered = sorted(rows, key=lambda row: order.index(row.measure))  # stable: otherwise as they were measured
    return pivot(ordered, ("measure", *extra, "patch"), "category", cell, mean=len({row.category for row in rows}) > 1)


def tree(rows: Sequence[Row], keys: Sequence[str] = ("measure", "base", "patch", "category")) -> dict[str, Any]:
    """Values by nested keys, as JSON keeps them."""
    made: dict[str, Any] = {}
    for row in rows:
        node = made
        for name in keys[:-1]:
            node = node.setdefault(_value(row, name), {})
        node[_value(row, keys[-1])] = row.value
    return made


def _value(row: Row, name: str) -> str:
    return str(getattr(row, name))

"""How good a guard is: figures by category and by kind of prompt, and how well it is calibrated."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safepatch.guard.texts import NO, UNSURE, YES

BINS = 10  # of the reliability plot (Guo et al. 2017, arXiv 1706.04599)
DIGITS = 4


class Trial(NamedTuple):
    """Prompts with their labels.

    Attributes:
        texts: N.
        kinds: of each: `held out`, `typo`, `negation`, ...
        truth: (N, C) int8: `YES`, `NO`, or `UNSURE` where it is not known.
        made: how many of them, the last, a grammar made.
    """

    texts: list[str]
    kinds: list[str]
    truth: Tensor
    made: int = 0


def figures(trial: Trial, chances: Tensor, thresholds: Tensor, categories: Sequence[str]) -> dict[str, Any]:
    """Everything that is reported of probabilities (N, C).

    Returns:
        `categories`: by name, `Scored`; `any`: of prompts, by whether any category claims them; `kinds`: by kind, how
        many there are and which share of them is flagged at all; `calibration`: bins; `written`: as `any`, without
        those that a grammar made, where there are such.
    """
    flags, truth = chances >= thresholds, trial.truth
    by_category = {}
    for i, name in enumerate(categories):
        known = truth[:, i] != UNSURE
        by_category[name] = scored(flags[known, i], truth[known, i] == YES) | {
            "threshold": round(float(thresholds[i]), DIGITS),
            "ece": ece(bins(chances[known, i], truth[known, i] == YES)),
        }
    unsafe, flagged, people = (truth == YES).any(1), flags.any(1), len(trial.texts) - trial.made
    is_kind = {kind: torch.tensor([k == kind for k in trial.kinds]) for kind in dict.fromkeys(trial.kinds)}
    kinds = {
        kind: {"n": int(rows.sum()), "unsafe": int(unsafe[rows].sum()), "flagged": _share(flagged[rows])}
        for kind, rows in is_kind.items()
    }
    known = truth != UNSURE
    whole = bins(chances[known], truth[known] == YES)
    return {
        "categories": by_category,
        "any": scored(flagged, unsafe),
        **({"written": scored(flagged[:people], unsafe[:people])} if trial.made else {}),
        "kinds": kinds,
        "confusion": confusion(flags, truth, categories),
        "ece": ece(whole),
        "calibration": whole,
    }


def scored(flags: Tensor, truth: Tensor) -> dict[str, Any]:
    """Precision, recall, F1 and false alarms per 1,000 harmless prompts of verdicts (N,) by labels (N,), both bool.

    A share of nothing is None.
    """
    hits, found, there = int((flags & truth).sum()), int(flags.sum()), int(truth.sum())
    harmless = len(truth) - there
    return {
        "unsafe": there,
        "harmless": harmless,
        "precision": round(hits / found, DIGITS) if found else None,
        "recall": round(hits / there, DIGITS) if there else None,
        "f1": round(2 * hits / (found + there), DIGITS) if found + there else None,
        "false_alarms": round(1000 * (found - hits) / harmless, 1) if harmless else None,
    }


def confusion(flags: Tensor, truth: Tensor, categories: Sequence[str]) -> dict[str, dict[str, int]]:
    """Of the prompts of each category, and of harmless ones, how many each category claims, and how many none."""
    rows = {name: truth[:, i] == YES for i, name in enumerate(categories)}
    rows |= {"harmless": (truth != YES).all(1)}
    return {
        name: {other: int(flags[some, i].sum()) for i, other in enumerate(categories)}
        | {"none": int((~flags[some].any(1)).sum()), "n": int(some.sum())}
        for name, some in rows.items()
    }


def bins(chances: Tensor, truth: Tensor) -> list[list[float]]:
    """For each of `BINS` equal parts of [0, 1] that holds any: mean probability, share that is true, how many."""
    place = (chances * BINS).long().clamp(max=BINS - 1)
    made = []
    for i in range(BINS):
        rows = place == i
        if rows.any():
            made.append([round(float(chances[rows].mean()), DIGITS), _share(truth[rows]), int(rows.sum())])
    return made


def ece(made: Sequence[Sequence[float]]) -> float:
    """Expected calibration error: by how much probabilities and shares differ, weighted by how many there are."""
    total = sum(n for *_, n in made)
    return round(sum(n * abs(said - true) for said, true, n in made) / total, DIGITS) if total else 0.0


def labels_of(found: Sequence[Sequence[str]], categories: Sequence[str]) -> Tensor:
    """Of rows that somebody has filed under categories, (N, C) int8."""
    return torch.tensor([[YES if name in named else NO for name in categories] for named in found], dtype=torch.int8)


def table(report: Mapping[str, Any]) -> list[str]:
    """Figures as markdown lines: by category, by kind of prompt, and which category claims prompts of which."""
    lines = ["| | unsafe | harmless | precision | recall | F1 | false alarms per 1,000 | ECE |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    rows = {**report["categories"], "any": report["any"] | {"ece": report["ece"]}}
    if "written" in report:
        rows["any, of people's prompts alone"] = report["written"] | {"ece": None}
    for name, row in rows.items():
        cells = [row[key] for key in ("unsafe", "harmless", "precision", "recall", "f1", "false_alarms", "ece")]
        lines.append(f"| {name} | {' | '.join(_cell(cell) for cell in cells)} |")
    lines += ["", "| prompts | n | unsafe | flagged |", "| --- | --- | --- | --- |"]
    for kind, row in report["kinds"].items():
        lines.append(f"| {kind} | {row['n']} | {row['unsafe']} | {row['flagged']:.3f} |")
    columns = [*report["categories"], "none", "n"]
    lines += ["", f"| prompts of, claimed by | {' | '.join(columns)} |", f"| {'--- | ' * len(columns)}--- |"]
    for name, row in report["confusion"].items():
        lines.append(f"| {name} | {' | '.join(str(row[column]) for column in columns)} |")
    return lines


def _cell(value: float | int | None) -> str:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def _share(flags: Tensor) -> float:
    return round(float(flags.float().mean()), DIGITS)

"""Several runs on one page: equal names are told apart, and what the runs do not share is said first."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from safepatch.errors import SafepatchError
from safepatch.reporting.html import Run, Section, read_run, write_page
from safepatch.results import NONE, Row

MUST_AGREE = ("images per rate", "denoising steps", "guidance scale", "scheduler", "seed", "detectors")  # of protocols


def build_comparison(folders: Sequence[Path], out: Path) -> Path:
    """Write one page about the runs in `folders`.

    Raises:
        SafepatchError: for a folder that is named twice, or cannot be reported.
    """
    labels = _labels([Path(folder) for folder in folders])
    return write_page(Path(out), joined({label: read_run(folder) for label, folder in labels.items()}))


def joined(runs: Mapping[str, Run]) -> Run:
    """One run of several, which are called by their labels."""
    if len(runs) == 1:
        return next(iter(runs.values()))
    notices = dict.fromkeys(notice for run in runs.values() for notice in run.notices)
    return Run(
        [row for rows in _told_apart(runs).values() for row in rows],
        [*_differences(runs), *notices],
        _protocols(runs),
        [_titled(section, label) for label, run in runs.items() for section in run.sections],
    )


def _labels(folders: Sequence[Path]) -> dict[str, Path]:
    """Folders by their names, or where these are equal by their paths."""
    names = [folder.resolve().name for folder in folders]
    labels = [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders, strict=True)]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise SafepatchError(f"'{twice}' is named twice; name each run once")
    return dict(zip(labels, folders, strict=True))


def _told_apart(runs: Mapping[str, Run]) -> dict[str, list[Row]]:
    """The rows of each run; a patch, or a base, that measured otherwise in an earlier run carries the run's label."""
    seen: dict[tuple[str, ...], Row] = {}
    made: dict[str, list[Row]] = {}
    for label, run in runs.items():
        clashing = {row.patch for row in run.rows if seen.get(_place(row), row) != row}
        rows = [_renamed(row, label) if row.patch in clashing else row for row in run.rows]
        made[label] = [row for row in rows if _place(row) not in seen]
        seen |= {_place(row): row for row in rows}
    return made


def _place(row: Row) -> tuple[str, ...]:
    return (row.patch, row.base, row.measure, row.category, row.detector)


def _renamed(row: Row, label: str) -> Row:
    return replace(row, patch=f"{'no patch' if row.patch == NONE else row.patch} ({label})")


def _differences(runs: Mapping[str, Run]) -> list[str]:
    """A sentence where figures must not be compared as they stand."""
    apart = [name for name in MUST_AGREE if len({run.protocol.get(name, "not recorded") for run in runs.values()}) > 1]
    return [f"These runs differ in {', '.join(apart)}: their figures are not comparable."] if apart else []


def _protocols(runs: Mapping[str, Run]) -> dict[str, str]:
    """What all share, and what each has of its own."""
    made = {}
    for name in dict.fromkeys(name for run in runs.values() for name in run.protocol):
        values = {label: run.protocol.get(name, "not recorded") for label, run in runs.items()}
        alike = len(set(values.values())) == 1
        made[name] = next(iter(values.values())) if alike else "; ".join(f"{k}: {v}" for k, v in values.items())
    return made


def _titled(section: Section, label: str) -> Section:
    return replace(section, title=f"{section.title} ({label})")

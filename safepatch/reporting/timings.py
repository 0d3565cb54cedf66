"""How long a run took, of its `timings.json`; no part of rows: these are equal from run to run, seconds are not."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from safepatch.errors import SafepatchError
from safepatch.results import NONE

FILE = "timings.json"
KINDS: dict[str, type | tuple[type, ...]] = {
    "model": str, "patch": str, "seconds": (int, float), "drawn": int, "processes": int
}  # fmt: skip


class Spent(NamedTuple):
    """What was spent on one patch, or on the base, on one model.

    Attributes:
        model, patch: by name.
        cells: that were timed.
        seconds: by the clock: drawing, judging and searching, without opening the model.
        drawn: images that were drawn; others had been drawn before.
        processes: that shared the work, at most.
    """

    model: str
    patch: str
    cells: int
    seconds: float
    drawn: int
    processes: int

    @property
    def said(self) -> str:
        """In words."""
        rate = f", {self.drawn / self.seconds:.2f} per second" if self.drawn and self.seconds else ""
        return f"{self.seconds:.0f} s, {self.drawn} images drawn{rate}"


def read_timings(folder: Path) -> list[Spent]:
    """What a run's folder says, by model and patch; nothing of older folders, which do not say.

    Raises:
        SafepatchError: where the file cannot be used.
    """
    path = Path(folder) / FILE
    try:
        records = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    except (ValueError, OSError) as error:
        raise SafepatchError(f"cannot read {path} as JSON ({error}); correct it or delete it") from error
    if not isinstance(records, list) or not all(_is_whole(record) for record in records):
        raise SafepatchError(f"{path} must be a JSON list of objects with {', '.join(KINDS)}; correct it or delete it")
    groups: dict[tuple[str, str], list[dict]] = {}
    for record in records:
        groups.setdefault((record["model"], record["patch"]), []).append(record)
    return [
        Spent(
            *key,
            len(own),
            sum(each["seconds"] for each in own),
            sum(each["drawn"] for each in own),
            max(each["processes"] for each in own),
        )
        for key, own in groups.items()
    ]


def told(spent: Sequence[Spent]) -> dict[str, str]:
    """As an entry of a report's protocol; none where nothing was timed."""
    if not spent:
        return {}
    most, total = max(each.processes for each in spent), sum(each.seconds for each in spent)
    many = len({each.model for each in spent}) > 1
    parts = (
        f"{'no patch' if each.patch == NONE else each.patch}{f' on {each.model}' if many else ''}: {each.said}"
        for each in spent
    )
    by = "one process" if most == 1 else f"{most} processes"
    return {"wall time": f"{total:.0f} s by {by}; {'; '.join(parts)}"}


def _is_whole(record: object) -> bool:
    return isinstance(record, dict) and all(
        isinstance(record.get(name), kind) and not isinstance(record.get(name), bool) for name, kind in KINDS.items()
    )

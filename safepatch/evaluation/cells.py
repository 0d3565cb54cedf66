"""The cells of a matrix and the log of those that are finished: each is measured once, whatever happens.

`cells.jsonl` holds one line per finished cell, with its rows, how long it took, and the names of its pictures, which
are on the disk before it; a line is whole or it is not there. What a cell in hand has drawn when a run is killed is
kept (`kept.py`).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safepatch.data.corpus import EVALUATIONS, Corpus
from safepatch.errors import SafepatchError
from safepatch.evaluation.bench import Protocol
from safepatch.evaluation.kept import digest
from safepatch.results import Row, append_lines


@dataclass(frozen=True)
class Cell:
    """One cell; two that are equal would give the same rows.

    Attributes:
        model, patch, category: by name.
        detector: as it was named; `none` for the cell of what needs no detector.
        settings: a digest of all else that its figures depend on.
        attacks: whether it is the cell of the attacks.
    """

    model: str
    patch: str
    category: str
    detector: str
    settings: str
    attacks: bool = False


@dataclass(frozen=True)
class Finished:
    """What a cell gave.

    Attributes:
        rows: its figures.
        pictures: as `gallery` keeps them.
        seconds: that it took, without opening model and patch; 0 where nobody took the time.
        drawn: images that were drawn for it, by all processes; others had been drawn before.
        processes: that shared them.
    """

    rows: Sequence[Row]
    pictures: Sequence[dict[str, Any]] = ()
    seconds: float = 0.0
    drawn: int = 0
    processes: int = 1

    @property
    def took(self) -> dict[str, float]:
        """What tells how long it took; nothing where nobody took the time."""
        names = ("seconds", "drawn", "processes") if self.seconds else ()
        return {name: getattr(self, name) for name in names}


class CellLog:
    """The finished cells of a run's folder.

    Args:
        out: the folder; a cell that lost one of its pictures there is not finished.
        writes: whether this is the process that keeps what `add` is told.
    """

    def __init__(self, out: Path, writes: bool = True) -> None:
        self.path, self._writes, images = out / "cells.jsonl", writes, out / "images"
        kept = {file.name for file in images.iterdir()} if images.is_dir() else set()
        lines = [line for file in sorted(out.glob("cells*.jsonl")) for line in _lines(file)]  # older runs had several
        found = dict(filter(None, map(_finished, lines)))
        self._cells = {
            cell: finished for cell, finished in found.items() if kept.issuperset(p["file"] for p in finished.pictures)
        }

    def __contains__(self, cell: Cell) -> bool:
        return cell in self._cells

    def __getitem__(self, cell: Cell) -> Finished:
        return self._cells[cell]

    def add(self, cell: Cell, finished: Finished) -> None:
        """Keep a finished cell; on return it is on the disk."""
        if self._writes:
            append_lines(self.path, [{"cell": asdict(cell), **asdict(finished)}])
        self._cells[cell] = finished


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []


def _finished(line: str) -> tuple[Cell, Finished] | None:
    """A cell and what it gave; None where a crash tore the line or another version wrote it: it is measured again."""
    try:
        record = json.loads(line)
        took = {name: record[name] for name in ("seconds", "drawn", "processes") if name in record}
        return Cell(**record["cell"]), Finished([Row(**row) for row in record["rows"]], record["pictures"], **took)
    except (ValueError, KeyError, TypeError, SafepatchError):
        return None


def words_of(corpus: Corpus, protocol: Protocol) -> str:
    """A digest of the prompts that a corpus is measured by, and of the labels that judge them."""
    prompts = {name: corpus.evaluation(name, protocol.n, protocol.seed) for name in EVALUATIONS}
    texts = {name: [(p.text, p.seed, p.guidance, p.asks) for p in made] for name, made in prompts.items()}
    labels = {each.name: dict(each.category.labels) for each in (corpus, *corpus.neighbours)}
    return digest(texts, labels)


def stamp(model: str) -> str:
    """What tells that the model at a path is another than before; empty for embedded names and Hub ids."""
    path = Path(model)
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else []
    return digest([(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]) if files else ""

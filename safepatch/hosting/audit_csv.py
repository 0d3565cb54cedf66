"""The table of an audit: a row for each prompt, on the disk as soon as it is found, and whole whatever is killed."""

import csv
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from safepatch.data.readers import Line
from safepatch.errors import SafepatchError
from safepatch.files import long_cells, unwritable
from safepatch.hosting.audit import Finding, overall

LONGEST = 1 << 24  # characters of a prompt that is read back


class AuditLog:
    """`audit.csv`: a row for each prompt, in the file's order.

    Args:
        path: of it.
        categories: of the patch.
        more: columns behind theirs.
    """

    def __init__(self, path: Path, categories: Sequence[str], more: Sequence[str] = ()) -> None:
        self.path, self.categories = path, tuple(categories)
        columns = [(name, f"{name} probability", f"{name} threshold", f"{name} words") for name in categories]
        self.header = ["row", "prompt", "verdict", *(column for group in columns for column in group), *more]

    def append(
        self, lines: Sequence[Line], findings: Sequence[Finding], more: Sequence[Sequence[str]] | None = None
    ) -> None:
        """Rows of these prompts; on return they are on the disk."""
        behind = [()] * len(lines) if more is None else more
        self._write([self._row(*given) for given in zip(lines, findings, behind, strict=True)])

    def resume(self) -> int:
        """How many prompts are in it; a row that a kill cut off is taken away, and an empty file gets its header."""
        if not self.path.exists():
            self._write([self.header])
        end, rows = 0, 0
        for row, place in self._whole_rows():
            if (rows == 0 and row != self.header) or len(row) != len(self.header):
                raise SafepatchError(f"{self.path} is no log of this audit; choose another -o, or delete its folder")
            end, rows = place, rows + 1
        if end < self.path.stat().st_size:
            os.truncate(self.path, end)
        if not rows:
            self._write([self.header])
        return max(0, rows - 1)

    def rows(self) -> Iterator[dict[str, str]]:
        """Its rows by column."""
        for number, (row, _) in enumerate(self._whole_rows()):
            if number:
                yield dict(zip(self.header, row, strict=True))

    def _row(self, line: Line, finding: Finding, more: Sequence[str]) -> list[str]:
        cells = []
        for name in self.categories:
            each = finding[name]
            cells += [each.verdict, _number(each.probability), _number(each.threshold), each.words]
        return [str(line.number), line.text, overall(finding), *cells, *more]

    def _write(self, rows: Sequence[Sequence[str]]) -> None:
        text = io.StringIO()
        csv.writer(text).writerows(rows)
        try:
            with self.path.open("ab") as file:
                file.write(text.getvalue().encode(errors="replace"))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise unwritable(self.path, error, "choose another -o") from error

    def _whole_rows(self) -> Iterator[tuple[list[str], int]]:
        """Each row that is there to its end, and the byte at which it ends."""
        place = 0

        def lines() -> Iterator[str]:
            nonlocal place
            with self.path.open("rb") as file:
                for line in file:
                    if not line.endswith(b"\n"):
                        return
                    place += len(line)
                    yield line.decode()

        with long_cells(LONGEST), suppress(csv.Error, UnicodeDecodeError):  # a row cut off within quotes
            for row in csv.reader(lines(), strict=True):
                yield row, place


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"

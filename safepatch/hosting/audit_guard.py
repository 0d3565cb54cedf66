"""What a guard says beside an audit: columns of its own in the table, and how both verdicts meet."""

from collections.abc import Mapping, Sequence

from safepatch.guard.decide import SCORE, decide
from safepatch.guard.encoders import LONGEST
from safepatch.guard.file import Guard
from safepatch.guard.score import PASS, UNREAD

COLUMN = "guard"
CLAIMED = "claimed"  # in counts, whatever it is for


class GuardColumns:
    """A guard's column for each prompt: the categories that claim it, and their probabilities.

    Args:
        guard: bound to its encoder.

    Attributes:
        header: names of the columns.
    """

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self.header = [COLUMN, *(f"{COLUMN} {name}" for name in guard.categories)]

    def __call__(self, texts: Sequence[str]) -> list[list[str]]:
        """The cells of each text; one that is too long is not read, and does not pass."""
        said = iter(decide(self._guard, SCORE, [text for text in texts if len(text) <= LONGEST]))
        unread = [UNREAD, *("" for _ in self._guard.categories)]
        return [self._cells(next(said).chances) if len(text) <= LONGEST else unread for text in texts]

    def _cells(self, chances: Mapping[str, float]) -> list[str]:
        thresholds = self._guard.info.thresholds
        names = [name for name, chance in chances.items() if chance >= thresholds[name]]
        return [" + ".join(names) or PASS, *(f"{chance:.4f}" for chance in chances.values())]


def kind_of(cell: str) -> str:
    """What a cell of the first column counts as."""
    return cell if cell in (PASS, UNREAD) else CLAIMED

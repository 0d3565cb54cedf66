"""Progress: bars at a terminal; in log files and pipes a line a minute, of what takes longer than that."""

import io
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm

MINUTE = 60.0  # seconds between two lines

Listener = Callable[[str, int, int | None], object]  # is told what is done, how much of it, and of how much
_LISTENER: ContextVar[Listener | None] = ContextVar("listener", default=None)


class Lines(tqdm):
    """Progress as plain lines, each whole, for whoever reads them later."""

    def __init__(self, iterable: Iterable | None = None, **options: Any) -> None:
        options |= {"file": io.StringIO(), "leave": False, "mininterval": MINUTE, "miniters": 1, "delay": MINUTE}
        super().__init__(iterable, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """A line, but none when it is over."""
        if msg is None:
            told = self.format_dict
            of = f" of {told['total']} ({100 * told['n'] / told['total']:.0f} %)" if told["total"] else ""
            note(f"{self.desc.rstrip(': ') or 'done'}: {told['n']}{of}")
        return True


class Told(tqdm):
    """Progress that is told to whoever listens, and written nowhere; what a listener raises ends the loop."""

    def __init__(self, iterable: Iterable | None = None, **options: Any) -> None:
        self._listener = _LISTENER.get()
        options |= {"file": io.StringIO(), "leave": False, "delay": 0, "mininterval": 0, "miniters": 1}
        super().__init__(iterable, **options)

    def refresh(self, nolock: bool = False, lock_args: Any = None) -> None:
        """Without tqdm's lock, which it would not give back where a listener raises."""
        self.display()

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """A word to the listener, but none when it is over."""
        if msg is None and self._listener:
            self._listener(self.desc.rstrip(": "), self.n, self.total)
        return True


@contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    """Within the block, in this thread, bars are told to `listener` instead of being shown."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def bar(iterable: Iterable | None = None, shown: bool = True, **options: Any) -> Any:
    """Progress of a loop, by tqdm; `shown` turns it off for processes that have nothing to say."""
    kind = Told if _LISTENER.get() else tqdm if sys.stderr.isatty() else Lines
    return kind(iterable, disable=not shown, **options)


def note(text: str) -> None:
    """A line about what is being done, beside any bars."""
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()

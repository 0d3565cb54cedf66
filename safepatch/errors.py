"""Every failure a user can cause is a `SafepatchError`; its message says what, where and what to do."""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


def printable(text: str) -> str:
    """`text` on one line, every character that is not printable (controls, bidi marks, ...) as its escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class SafepatchError(Exception):
    """Base of all errors a user can act on; the CLI prints it as one line and exits with 2.

    Args:
        message: may quote what files say; what a terminal would obey in it is escaped.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(str(message)))


class UnknownName(SafepatchError, KeyError):
    """A name that a table does not hold."""

    __str__ = Exception.__str__  # KeyError would print the message's repr


class ConfigError(SafepatchError, ValueError):
    """A configuration that cannot be run."""


class ArtifactError(SafepatchError):
    """A patch file that is damaged, altered, or not a patch."""


class NotTrusted(SafepatchError):
    """A file that none of the trusted keys signed as it is."""


class BaseMismatch(SafepatchError):
    """A patch made for another architecture than the model at hand."""


class ModelNotFound(SafepatchError, FileNotFoundError):
    """A model name or path that leads nowhere."""


class UnsupportedModel(SafepatchError):
    """A model that is there but cannot be used: of another kind, incomplete, or in a format that is refused."""


class PatchBypassed(SafepatchError, RuntimeError):
    """An image was made, or was about to be returned, without the patch that should have been active."""


class UnknownWords(PatchBypassed):
    """Text states that nobody knows the words of, where a patch would have to read those words."""


class PromptBlocked(SafepatchError, RuntimeError):
    """A prompt that a guard refused.

    Args:
        message: names the category and its probability.
        category: that claims it; empty where nobody could read it.
        probability: of it.
    """

    def __init__(self, message: str = "", category: str = "", probability: float = 0.0) -> None:
        super().__init__(message)
        self.category, self.probability = category, probability


class PromptError(SafepatchError, ValueError):
    """A prompt or prompt set that may not or cannot be used."""


class MergeError(SafepatchError, ValueError):
    """Patches that cannot be merged as asked."""


class ReceiptError(SafepatchError):
    """An image whose receipt is missing, damaged, unsigned where it must not be, or not its own."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest of `known`, or the list of them when none is close."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(names)}"


def lookup(table: Mapping[str, T], name: str, what: str) -> T:
    """The entry of `table` called `name`; raises `UnknownName` that offers the nearest name."""
    if name not in table:
        raise UnknownName(f"no {what} '{name}'{nearest(name, table)}")
    return table[name]

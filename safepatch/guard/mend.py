"""What a text says to people, before a guard reads it: signs made plain, and slips of the keyboard mended.

An encoder makes little of words that it must spell. A word is mended where the encoder does not know it as one token,
and a single slip makes it of a word that names a category: a letter lost, put in, exchanged or swapped with its
neighbor (Damerau 1964), the first letter staying. What the encoder knows is left alone, so "bun" is no gun and "bear"
no beer.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable

SHORTEST = 4  # letters of a name that is restored: shorter ones are a slip away from too much
REMEMBERED = 1 << 16  # words
# Cyrillic and Greek, by Unicode's list of what may be confused (UTS 39).
LOOK_ALIKES = str.maketrans("аеорсухіјѕԁһкмтвнοανρικυ", "aeopcyxijsdhkmtbhoavpiku")
_WORD = re.compile(r"[^\W\d_]+")
_MIXED = re.compile(r"\w*[a-zA-Z]\w*")


def legible(text: str) -> str:
    """`text` with signs of compatibility as plain ones (NFKC), and without those that cannot be seen.

    In words that have Latin letters too, letters of other scripts that look like Latin ones are those.
    """
    seen = "".join(c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c) != "Cf")
    return seen if seen.isascii() else _MIXED.sub(lambda match: match.group().translate(LOOK_ALIKES), seen)


class Mender:
    """Restores names that were slipped.

    Args:
        names: of what categories are about.
        is_word: whether the encoder knows a word as one token.
        spared: words that it does not, and which are right nevertheless.
    """

    def __init__(self, names: Iterable[str], is_word: Callable[[str], bool], spared: Iterable[str] = ()) -> None:
        words = words_in(" ".join(names))
        self._known = words.union(spared)
        self._by_first: dict[str, list[str]] = {}
        for word in sorted(words):
            if len(word) >= SHORTEST:
                self._by_first.setdefault(word[0], []).append(word)
        self._is_word = is_word
        self._read: dict[str, str] = {}

    def __call__(self, text: str) -> str:
        """The text with every word as it is read."""
        return _WORD.sub(lambda match: self._mended(match.group()), text) if self._by_first else text

    def _mended(self, word: str) -> str:
        if len(self._read) >= REMEMBERED:
            self._read.clear()
        if word not in self._read:
            self._read[word] = self._restored(word)
        return self._read[word]

    def _restored(self, word: str) -> str:
        plain = word.casefold()
        near = (name for name in self._by_first.get(plain[0], ()) if is_one_slip(plain, name))
        name = next(near, None) if plain not in self._known else None
        return word if name is None or self._is_word(plain) else name


def words_in(text: str) -> set[str]:
    """Its words, in small letters."""
    return set(_WORD.findall(text.casefold()))


def is_one_slip(left: str, right: str) -> bool:
    """Whether one letter more, less or another, or two neighbours swapped, make one word of the other."""
    if abs(len(left) - len(right)) > 1:
        return False
    start = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
    left, right = left[start:], right[start:]
    while left and right and left[-1] == right[-1]:
        left, right = left[:-1], right[:-1]
    return max(len(left), len(right)) <= 1 or (len(left) == 2 and left == right[::-1])

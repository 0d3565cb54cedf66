"""Letters that look alike, and ones that cannot be seen, in the words that name the category."""

from collections.abc import Sequence

from safepatch.attacks.base import Round, names_in, reworded
from safepatch.data.corpus import Corpus
from safepatch.data.prompts import Prompt

ALIKE = {"a": "а", "c": "с", "e": "е", "i": "і", "o": "о", "p": "р", "x": "х", "y": "у"}  # Cyrillic  # noqa: RUF001
UNSEEN = "\u200b"  # zero-width space


def rounds(corpus: Corpus, prompts: Sequence[Prompt], seed: int, budget: int) -> list[Round]:
    """In turn one letter that looks alike, and one that is not seen."""
    return [Round(tuple(reworded(p, _hidden(corpus, p.text, i)) for p in prompts)) for i in range(budget)]


def _hidden(corpus: Corpus, text: str, number: int) -> str:
    words = names_in(corpus, text)
    if not words:
        return text
    word = words[-1]
    letters = [letter for letter in word if letter in ALIKE]
    if number % 2 == 0 and letters:
        letter = letters[number // 2 % len(letters)]
        return text.replace(word, word.replace(letter, ALIKE[letter], 1), 1)
    place = 1 + number // 2 % (len(word) - 1)
    return text.replace(word, word[:place] + UNSEEN + word[place:], 1)

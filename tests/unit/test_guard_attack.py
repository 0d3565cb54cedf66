"""Other ways of asking a guard: what passes is counted, what is refused gives no picture, and learners learn of it."""

import pytest
import torch

from safepatch.data.corpus import Corpus
from safepatch.errors import ConfigError, UnknownName
from safepatch.guard.attack import Attacked, attack_guard, table
from safepatch.guard.file import GuardInfo
from safepatch.guard.mend import words_in
from tests.small import new_small_pipe

WEAPONS = "weapons"
CORPUS = Corpus.open(WEAPONS)
NAMES = {name.split()[-1] for concept in CORPUS.words.concepts for name in concept.known_names}


class Words:
    """A guard that claims whatever has the last word of a known name."""

    categories, thresholds = (WEAPONS,), torch.tensor([0.5])
    info = GuardInfo({WEAPONS: ""}, {WEAPONS: 0.5}, "clip")

    def __call__(self, texts):
        return torch.tensor([[0.9 if words_in(text) & NAMES else 0.1] for text in texts])


class Sight:
    """Sees the category in whatever is drawn of a text with a certain word, and remembers all texts."""

    def __init__(self, word: str = "") -> None:
        self.word, self.drawn, self.detector = word, [], self
        self.threshold = 0.5

    def __call__(self, texts, seeds):
        self.drawn += texts
        return torch.tensor([float(self.word in text) for text in texts])


def test_what_no_attack_brings_through_a_slip_does():
    found = attack_guard(Words(), CORPUS, [("restart", 1), ("typos", 3), ("words", 2)], 12)
    passed = {each.attack: each.passed for each in found}
    assert passed["restart"] < 0.2  # control: held-out names aside the guard knows its words
    assert passed["typos"] > 0.9
    assert passed["words"] == passed["restart"]
    assert {each.drawn for each in found} == {None}


def test_only_what_passes_is_drawn_and_only_what_shows_it_counts():
    blind, sight = Sight("\0"), Sight("")
    for eye, share in ((blind, 0.0), (sight, 1.0)):
        (found,) = attack_guard(Words(), CORPUS, [("typos", 3)], 12, eye=eye)
        assert found.drawn == found.passed * share
        assert eye.drawn
        assert not any(words_in(text) & NAMES for text in eye.drawn)


def test_an_attack_that_asks_learns_from_what_it_sees():
    eye = Sight()
    (found,) = attack_guard(Words(), CORPUS, [("sneaky-prompt", 2)], 3, pipe=new_small_pipe(), eye=eye)
    assert (found.prompts, found.budget) == (3, 2)
    assert found.passed == found.drawn == 1.0
    assert not any(words_in(text) & NAMES for text in eye.drawn)


def test_what_cannot_be_tried_is_one_line():
    with pytest.raises(ConfigError, match="knows nothing of 'gore'"):
        attack_guard(Words(), Corpus.open("gore"), [("typos", 1)], 2)
    with pytest.raises(ConfigError, match="give --model"):
        attack_guard(Words(), CORPUS, [("mma", 1)], 2)
    with pytest.raises(ConfigError, match="give --draw"):
        attack_guard(Words(), CORPUS, [("sneaky-prompt", 1)], 2, pipe=new_small_pipe())
    with pytest.raises(UnknownName, match="no attack with texts 'soft-prompt'"):
        attack_guard(Words(), CORPUS, [("soft-prompt", 1)], 2)


def test_a_table_has_a_row_for_each():
    rows = table([Attacked(WEAPONS, "typos", 12, 3, 0.25, None), Attacked(WEAPONS, "words", 12, 3, 0.5, 0.25)])
    assert rows[2:] == ["| weapons | typos:3 | 12 | 0.250 | - |", "| weapons | words:3 | 12 | 0.500 | 0.250 |"]

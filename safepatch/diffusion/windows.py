"""Windows of a prompt: every few words of it in a row, encoded alone.

What is put before, behind or around a window changes nothing of what is read of it (DESIGN.md, 53). Words are taken
from the tokens that a text encoder is given, so they are the words that it reads, however they were typed. CLIP's
encoders are causal: the few states of a window are the same whatever padding follows, so none is computed.
"""

import string
from collections.abc import Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from safepatch.diffusion.components import Components
from safepatch.diffusion.encoding import encode_tokens

STATES = 8  # of a window; one of more tokens has as many more as it needs, in eights
BATCH = 64  # windows encoded at a time

W = TypeVar("W", bound=Hashable)
Word = tuple[int, ...]
Window = tuple[Word, ...]


class Spelling:
    """How a CLIP tokenizer spells words: which tokens end one, which are only punctuation or signs of its own."""

    def __init__(self, tokenizer: Any) -> None:
        special, added = set(tokenizer.all_special_ids), set(tokenizer.get_added_vocab().values())
        self._mute, self._ends = set(special), added - special
        for token, number in tokenizer.get_vocab().items():
            if token.endswith("</w>"):
                self._ends.add(number)
            if number not in added and all(sign in string.punctuation for sign in token.removesuffix("</w>")):
                self._mute.add(number)

    def words(self, tokens: Sequence[int]) -> list[Word]:
        """The words among tokens, each as its own tokens; punctuation and padding are left out, and part words."""
        found, word = list[Word](), list[int]()
        for token in tokens:
            if token not in self._mute:
                word.append(token)
            if word and (token in self._ends or token in self._mute):
                found.append(tuple(word))
                word = []
        return [*found, tuple(word)] if word else found


def windows(words: Sequence[W], width: int) -> list[tuple[W, ...]]:
    """The distinct windows of at most `width` words, in the order in which they begin."""
    starts = range(len(words))
    return list(dict.fromkeys(tuple(words[i : i + n + 1]) for i in starts for n in range(min(width, len(words) - i))))


def encode_windows(components: Components, some: Sequence[Window]) -> Tensor:
    """Text states of windows, each encoded alone, (B, tokens, width).

    All encoders read the same tokens. A shorter window's states are filled up with its first, which all begin with.
    """
    parts = [_encode(components, some[at : at + BATCH]) for at in range(0, len(some), BATCH)]
    longest = max(part.shape[1] for part in parts)
    return torch.cat([_filled(part, [part.shape[1]] * len(part), longest) for part in parts])


def _encode(components: Components, some: Sequence[Window]) -> Tensor:
    pairs = components.text_encoders()
    most = min(encoder.config.max_position_embeddings for _, encoder in pairs)
    tokens = [[token for word in window for token in word][: most - 2] for window in some]
    lengths = [min(most, max(STATES, 8 * -(-(len(each) + 2) // 8))) for each in tokens]
    given = []
    for tokenizer, _ in pairs:
        start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        rows = [[start, *each, end] for each in tokens]
        given.append(torch.tensor([row + [pad] * (max(lengths) - len(row)) for row in rows]))
    return _filled(encode_tokens(components, given).states, lengths, max(lengths))


def _filled(states: Tensor, lengths: Sequence[int], to: int) -> Tensor:
    """The first `lengths` states of each row, and its very first up to `to`."""
    states = torch.cat((states, states[:, :1].expand(-1, to - states.shape[1], -1)), dim=1)
    beyond = torch.arange(to)[None] >= torch.tensor(lengths)[:, None]
    return torch.where(beyond.to(states.device)[..., None], states[:, :1], states)

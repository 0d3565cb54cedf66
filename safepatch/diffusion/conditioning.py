"""What a host is told of a prompt: its text states, and what else its family has."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Conditioning(NamedTuple):
    """What a host reads of B prompts.

    Attributes:
        states: text states, (B, tokens, width).
        pooled: SDXL's, SD3's and Flux's pooled text states, (B, width'); None for SD 1 and 2.
        score: the aesthetic score that SDXL's refiner is told, (B,); None for all others.
        tokens: what CLIP's text encoders were asked, (B, encoders, tokens), for a patch of one to read anew; None where
            no words stand behind the states.
        prefix: input embeddings that such a patch reads instead of those of the tokens at the places 1 to k, (B, k,
            width of its encoder); None for words alone.
    """

    states: Tensor
    pooled: Tensor | None = None
    score: Tensor | None = None
    tokens: Tensor | None = None
    prefix: Tensor | None = None

    def of(self, rows: slice | Tensor) -> "Conditioning":
        """Some of the rows, by a slice, their numbers or a mask."""
        return self._each(lambda part: part[rows])

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Conditioning":
        """The same on `device`, in `dtype` if one is given."""
        return self._each(lambda part: moved(part, device, dtype if part.is_floating_point() else None))

    def of_rows(self, rows: slice) -> "Conditioning":
        """Some prompts' alone."""
        return self._each(lambda part: part[rows])

    def expand(self, n: int) -> "Conditioning":
        """One prompt's for n rows, or n prompts' as they are."""
        return self._each(lambda part: part.expand(n, *part.shape[1:]))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Conditioning":
        return Conditioning(change(self.states), *(part if part is None else change(part) for part in self[1:]))


def joined(parts: Sequence[Conditioning]) -> Conditioning:
    """The rows of several, one after the other."""
    others = zip(*(part[1:] for part in parts), strict=True)
    joint = (None if column[0] is None else torch.cat(column) for column in others)
    return Conditioning(torch.cat([part.states for part in parts]), *joint)


def moved(tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """`tensor` on `device`; towards a GPU by pinned memory, so that nobody waits for the copy."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, dtype, non_blocking=True)

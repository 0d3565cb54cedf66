"""What a gate reads of captions' windows: a bag of them for each caption, of which the strongest counts.

Learning from bags of which only the bag has a label is multiple-instance learning with a maximum (Dietterich et al.
1997; Amores 2013): a caption is one the patch is for if one of its windows is.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Self, TypeVar

import torch
from torch import Tensor

from safepatch.diffusion import Host, Spelling, Window, encode_windows, windows
from safepatch.patch.gate import TextGate
from safepatch.progress import bar

CHUNK = 256  # windows encoded between two steps of the progress bar
W = TypeVar("W", bound=Hashable)  # a window
NEVER = -1e4  # the logit of a caption without a window


class Bags:
    """The windows of captions; a window of several captions is encoded once.

    Args:
        found: the windows of each caption.
        encode: what makes text states, (B, tokens, width), of B of them, each alone; shorter ones are filled up with
            their first state.
    """

    def __init__(self, found: Sequence[Sequence[W]], encode: Callable[[Sequence[W]], Tensor]) -> None:
        numbers = {window: i for i, window in enumerate(dict.fromkeys(w for bag in found for w in bag))}
        self._bags = [torch.tensor([numbers[window] for window in bag], dtype=torch.long) for bag in found]
        distinct = list(numbers)
        parts = [
            encode(distinct[at : at + CHUNK]).half().cpu()  # there are many
            for at in bar(range(0, len(distinct), CHUNK), desc="reading windows", leave=False)
        ]
        longest = max((part.shape[1] for part in parts), default=0)
        self._states = torch.empty(len(distinct), longest, parts[0].shape[2] if parts else 0, dtype=torch.float16)
        for at, part in zip(range(0, len(distinct), CHUNK), parts, strict=True):
            self._states[at : at + CHUNK] = part[:, :1]  # what a shorter window is filled up with
            self._states[at : at + CHUNK, : part.shape[1]] = part

    @classmethod
    def of(cls, host: Host, captions: Sequence[str], width: int) -> Self:
        """Those of at most `width` words, as the frozen model's text encoders read them."""
        return cls(bags(host, captions, width), partial(encode_windows, host.components))

    def read(self, gate: TextGate, captions: Tensor) -> Tensor:
        """What a gate of one group makes of the strongest window of each of these captions: logits (B,)."""
        some = [self._bags[i] for i in captions.tolist()]
        distinct, places = torch.cat(some).unique(return_inverse=True)
        if not len(distinct):
            return torch.full((len(some),), NEVER)
        logits = gate.read(self._states[distinct].float())[:, 0][places]
        rows = torch.repeat_interleave(torch.arange(len(some)), torch.tensor([len(bag) for bag in some]))
        return torch.full((len(some),), NEVER).scatter_reduce(0, rows, logits, "amax")


def bags(host: Host, captions: Sequence[str], width: int) -> list[list[Window]]:
    """The windows of each caption, as the host's first text encoder reads it."""
    tokenizer, _ = host.components.text_encoders()[0]
    spelling, length = Spelling(tokenizer), tokenizer.model_max_length
    tokens = tokenizer(list(captions), truncation=True, max_length=length).input_ids if captions else []
    return [windows(spelling.words(each), width) for each in tokens]

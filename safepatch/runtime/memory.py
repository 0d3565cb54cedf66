"""What the parts of a patch remember from step to step of a denoising."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from safepatch.patch import Residuals
from safepatch.runtime.call import Call
from safepatch.runtime.known import Known


class Cached(NamedTuple):
    """Residuals that a control patch made, and the calls they were used for.

    Attributes:
        residuals: as they were handed to the host; None where a gate was closed.
        shape: of the sample.
        rows: those that were corrected.
        states: what the host was told of the rows.
        timestep: of the last call.
        scales: their strengths.
        uses: how many calls they were used for.
        calls: how many there were at that timestep: several where the UNet is called tile by tile.
    """

    residuals: Residuals | None
    shape: torch.Size
    rows: slice
    states: Known
    timestep: float
    scales: Tensor
    uses: int = 1
    calls: int = 1

    def serves(self, call: Call) -> bool:
        """Whether `call` is a later step of the same denoising, and that of the last one was no tile's."""
        alike = (self.shape, self.rows) == (call.sample.shape, call.rows) and self.states.is_still(*call.told)
        return alike and call.timestep < self.timestep and self.calls == 1 and self.residuals is not None

    def calls_with(self, call: Call) -> int:
        """How many calls there are at the timestep of `call`, with it.

        A step that a scheduler goes over twice, as PNDM does with its second, looks like two tiles; the next does not.
        """
        return self.calls + 1 if call.timestep == self.timestep else 1


class Read(NamedTuple):
    """What a gate that reads text alone made of the text states of a denoising: it is the same at every step."""

    states: Known
    rows: slice
    probabilities: Tensor


class Heard(NamedTuple):
    """What the gates made of the words behind the text states of a denoising, (B, gates) logits."""

    states: Known
    rows: slice
    logits: Tensor


@dataclass
class Memory:
    """All of it, of one thread's denoising; by the part's identity."""

    residuals: dict[int, Cached] = field(default_factory=dict)
    texts: dict[int, Read] = field(default_factory=dict)
    words: Heard | None = None

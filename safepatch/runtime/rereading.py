"""What one patched text encoder makes of states that the frozen one made: of the same words, in the same sums."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from safepatch.diffusion import Components
from safepatch.patch.text import TextPatch, read_patched
from safepatch.runtime.heard import Memo
from safepatch.runtime.parts import ActivePart
from safepatch.runtime.readings import Match, Reading, Readings

READ = 128  # prompts whose patched states are remembered, of one layer each
BESIDE = 0.3  # the most that states may hold beside what they are a sum of, a share of their length
POOLED = -1  # in a layer's place


class Asked(NamedTuple):
    """What a patched encoder is to read; what it makes of it is remembered by this.

    Attributes:
        reading: of a prompt.
        layer: that is taken, or `POOLED`.
        scales: of the parts, (number, scale) of those that act.
    """

    reading: tuple
    layer: int
    scales: tuple[tuple[int, float], ...]


class OfEncoder:
    """The parts of a patch that change one text encoder.

    Args:
        components: of the pipeline.
        component: which encoder.
        parts: with their numbers among all parts.
    """

    def __init__(self, components: Components, component: str, parts: Sequence[tuple[int, ActivePart]]) -> None:
        self.component, self.parts = component, dict(parts)
        number, self.encoder = components.encoder(component)
        widths = [each.config.hidden_size for _, each in components.text_encoders()]
        self.columns = slice(sum(widths[:number]), sum(widths[: number + 1]))
        self.is_pooled = self.encoder is components.text_encoder_2
        self.readings = Readings(self.encoder)
        self._memo = Memo[Asked, Tensor](READ)

    def exchanged(self, states: Tensor, scales: Mapping[int, float]) -> Tensor | None:
        """One row's states, (tokens, width) of all encoders, in which this one's are patched; None for nobody's."""
        own = states[:, self.columns]
        for length in self.readings.lengths():
            if len(states) % length:
                continue  # somebody added states behind those of the words
            matches = [self.readings.of_states(chunk) for chunk in own.split(length)]
            if not all(matches):
                continue
            pairs = zip(own.split(length), matches, strict=True)
            patched = [self._patched(chunk, match, scales) for chunk, match in pairs if match]
            chunks = [chunk for chunk in patched if chunk is not None]
            if len(chunks) < len(patched):
                continue
            made = states.clone()
            made[:, self.columns] = torch.cat(chunks)
            return made
        return None

    def exchanged_pooled(self, pooled: Tensor, scales: Mapping[int, float]) -> Tensor | None:
        """One row's pooled states, (width,); None for nobody's."""
        match = self.readings.of_pooled(pooled[None])
        made = match and self._patched(pooled[None], match, scales, is_pooled=True)
        return None if made is None else made[0]

    def _patched(
        self, chunk: Tensor, match: Match, scales: Mapping[int, float], is_pooled: bool = False
    ) -> Tensor | None:
        """What the patched encoder makes of `chunk` (T, width); None where too much of it is not the match's."""
        layer = POOLED if is_pooled else match.layer
        new = [self._read(each, layer, scales).to(chunk) for each in match.readings]
        if match.is_whole:
            return new[0]
        old = [self._read(each, layer, {}).to(chunk) for each in match.readings]
        basis, moved = (torch.stack(some, dim=-1).float() for some in (old, new))  # (T, width, prompts)
        shares = torch.linalg.lstsq(basis.cpu(), chunk.float().cpu()[..., None], driver="gelsd").solution.to(basis)
        beside = chunk.float() - (basis @ shares)[..., 0]
        if beside.norm() > BESIDE * chunk.float().norm():
            return None
        return (beside + (moved @ shares)[..., 0]).to(chunk.dtype)

    def _read(self, reading: Reading, layer: int, scales: Mapping[int, float]) -> Tensor:
        """What the encoder makes of a prompt, patched at these scales; read once, alone."""
        asked = Asked(reading.key, layer, tuple(sorted(scales.items())))

        def make(_: list[Asked]) -> list[Tensor]:
            strengths = [(self._module(number), scale) for number, scale in asked.scales]
            return [read_patched(self.encoder, strengths, lambda made: reading.again(made, layer == POOLED, layer))]

        return self._memo.of([asked], make)[asked]

    def _module(self, number: int) -> TextPatch:
        patch = self.parts[number].patch
        assert isinstance(patch, TextPatch)
        return patch

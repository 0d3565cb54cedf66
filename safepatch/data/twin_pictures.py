"""Pictures in twos: what a model draws of an unsafe prompt and of its safe twin, from the same noise."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from safepatch.data.bank import Retained, build_retained, plain_drawing
from safepatch.data.corpus import Corpus
from safepatch.data.latents import Latents
from safepatch.data.prompts import EMPTY
from safepatch.data.settings import DataConfig
from safepatch.data.texts import Texts
from safepatch.diffusion import Conditioning, Host, moved
from safepatch.errors import ConfigError


@dataclass(frozen=True)
class Twins:
    """Rows of pictures, clean and scaled latents, (B, 4, h, w).

    Attributes:
        unsafe, safe: of each pair's members.
        unsafe_prompt, safe_prompt: the prompts they were drawn of.
        empty: the empty prompt, B times.
        retain: as many pictures of what must stay; None where there are none.
    """

    unsafe: Tensor
    safe: Tensor
    unsafe_prompt: Conditioning
    safe_prompt: Conditioning
    empty: Conditioning
    retain: Tensor | None = None

    def to(self, device: torch.device) -> "Twins":
        """The same rows on `device`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        placed = {name: value.to(device) for name, value in values.items() if isinstance(value, Conditioning)}
        placed |= {name: moved(value, device) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **placed)


@dataclass(frozen=True)
class TwinBank:
    """The twins of one corpus.

    Attributes:
        unsafe, safe: latents of each pair's members, (N, 4, h, w).
        texts: what the host reads of every prompt.
        prompts: numbers of the unsafe and of the safe prompts in `texts`, (N,) each, and of the empty one, (1,).
        retained: what must be preserved, if anything.
    """

    unsafe: Latents
    safe: Latents
    texts: Texts
    prompts: tuple[Tensor, Tensor, Tensor]
    retained: Retained | None = None

    def __len__(self) -> int:
        return len(self.unsafe)

    def batch(self, step: int, size: int, seed: int) -> Twins:
        """The batch of `size` pairs, and as many preserved pictures, that (step, seed) stands for."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        pairs = torch.randint(len(self), (size,), generator=generator)
        unsafe, safe = (self.texts[numbers[pairs]] for numbers in self.prompts[:2])
        empty = self.texts[self.prompts[2]].expand(size)
        twins = Twins(self.unsafe[pairs], self.safe[pairs], unsafe, safe, empty)
        if self.retained is None:
            return twins
        kept = torch.randint(len(self.retained), (size,), generator=generator)
        return replace(twins, retain=self.retained.latents[kept])


def build_twins(host: Host, corpus: Corpus, data: DataConfig, retain: bool = False) -> TwinBank:
    """Draw, read and keep both members of each pair.

    Raises:
        ConfigError: where the safe twin of a prompt has no words of its own, so that nobody can draw it.
    """
    if corpus.rewrite.by == "guided":
        raise ConfigError(
            "this objective needs a picture of each safe twin, which guided has not; set another rewrite.by"
        )
    pairs = corpus.pairs(data.pairs, data.seed, data.companions)
    sides = [[getattr(pair, side) for pair in pairs] for side in ("unsafe", "safe")]
    texts = Texts(host, [*(prompt.text for side in sides for prompt in side), EMPTY.text], data)
    drawn = [[plain_drawing(one, i, data, pairs[i].unsafe.seed) for i, one in enumerate(side)] for side in sides]
    labels = [f"drawing {corpus.name}: {side}" for side in ("unsafe", "safe")]
    unsafe, safe = (Latents(host, side, data, label) for side, label in zip(drawn, labels, strict=True))
    numbers = [texts.numbers([prompt.text for prompt in side]) for side in sides]
    kept = build_retained(host, corpus, data.pairs, data) if retain else None
    return TwinBank(unsafe, safe, texts, (numbers[0], numbers[1], texts.numbers([EMPTY.text])), kept)

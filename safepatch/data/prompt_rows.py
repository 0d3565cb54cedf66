"""Prompts to learn from without pictures; or with what the base draws, and the noise that it began with."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from safepatch.data.bank import Batch, plain_drawing
from safepatch.data.category import Rewrite
from safepatch.data.corpus import Corpus
from safepatch.data.latents import Drawing, Latents
from safepatch.data.prompts import EMPTY, Prompt
from safepatch.data.settings import DataConfig
from safepatch.data.texts import Texts
from safepatch.diffusion import Conditioning, Host
from safepatch.errors import ConfigError


@dataclass(frozen=True)
class Asked(Batch):
    """A batch whose latents are pictures of its safe prompts; blank where there are none.

    Attributes:
        empty: the empty prompt, B times.
        noise, retain_noise: what the base drew the pictures from; None where there are none.
    """

    empty: Conditioning | None = None
    noise: Tensor | None = None
    retain_noise: Tensor | None = None


@dataclass(frozen=True)
class Pictures:
    """What the base draws of prompts, and from which seeds.

    Attributes:
        latents: of each, (N, 4, h, w).
        seeds: of each's noise.
    """

    latents: Latents
    seeds: Sequence[int]

    @classmethod
    def of(cls, host: Host, drawings: Sequence[Drawing], data: DataConfig, label: str) -> "Pictures":
        """Draw them."""
        return cls(Latents(host, drawings, data, label), [drawing.seed for drawing in drawings])

    def __getitem__(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """The latents of these numbers, and the noise they were drawn from, (B, 4, h, w) each."""
        latents = self.latents[numbers]
        shape, seeds = latents.shape[1:], [self.seeds[i] for i in numbers.tolist()]
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return latents, torch.stack(noise)


@dataclass(frozen=True)
class PromptRows:
    """The prompts of one corpus.

    Attributes:
        texts: what the host reads of each.
        unsafe, safe, kept: numbers of prompts in `texts`, (N,) each; of pairs, and of what must stay.
        empty: that of the empty prompt, (1,).
        rewrite: where the safe twins come from.
        shape: of one picture's latents.
        layers: (out, in) of the host's layers that a low-rank update may change, by name.
        pictures: of the safe prompts and of what must stay, if they are drawn.
    """

    texts: Texts
    unsafe: Tensor
    safe: Tensor
    kept: Tensor
    empty: Tensor
    rewrite: Rewrite
    shape: tuple[int, int, int]
    layers: dict[str, tuple[int, int]]
    pictures: tuple[Pictures, Pictures] | None = None

    def __len__(self) -> int:
        return len(self.unsafe)

    def batch(self, step: int, size: int, seed: int) -> Asked:
        """The batch of `size` pairs, and of as many prompts that must stay, that (step, seed) stands for."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        pairs, kept = (torch.randint(len(of), (size,), generator=generator) for of in (self.unsafe, self.kept))
        unsafe, safe, retain = (
            self.texts[of[rows]] for of, rows in ((self.unsafe, pairs), (self.safe, pairs), (self.kept, kept))
        )
        blank, empty = torch.zeros(size, *self.shape), self.texts[self.empty].expand(size)
        asked = Asked(blank, unsafe, safe, self.rewrite, blank, retain, empty=empty)
        if self.pictures is None:
            return asked
        latents, noise = self.pictures[0][pairs]
        retained, retain_noise = self.pictures[1][kept]
        return replace(asked, latents=latents, noise=noise, retain_latents=retained, retain_noise=retain_noise)


def build_prompt_rows(
    host: Host, corpus: Corpus, data: DataConfig, layers: dict[str, tuple[int, int]], draw: bool
) -> PromptRows:
    """Read the prompts of a corpus; and `draw` its safe ones, and those that must stay, if asked to.

    Raises:
        ConfigError: where the safe twin of a prompt has no words of its own.
    """
    if corpus.rewrite.by == "guided":
        raise ConfigError("this objective needs the words of each safe twin, which guided has not; set rewrite.by")
    pairs, kept = corpus.pairs(data.pairs, data.seed, data.companions), corpus.retain(data.pairs, data.seed)
    sides = [[pair.unsafe for pair in pairs], [pair.safe for pair in pairs], kept, [EMPTY]]
    texts = Texts(host, [prompt.text for side in sides for prompt in side], data)
    unsafe, safe, stays, empty = (texts.numbers([prompt.text for prompt in side]) for side in sides)
    rows = PromptRows(texts, unsafe, safe, stays, empty, corpus.rewrite, host.latent_shape, layers)
    if not draw:
        return rows
    twins = [_drawing(pair.safe, i, data, pair.unsafe.seed) for i, pair in enumerate(pairs)]
    others = [_drawing(prompt, i, data) for i, prompt in enumerate(kept, start=data.pairs)]
    drawn = Pictures.of(host, twins, data, f"drawing {corpus.name}: safe")
    return replace(rows, pictures=(drawn, Pictures.of(host, others, data, "drawing what must stay")))


def _drawing(prompt: Prompt, i: int, data: DataConfig, seed: int | None = None) -> Drawing:
    """From noise, even where a prompt comes with a picture."""
    return replace(plain_drawing(prompt, i, data, seed), image=None)

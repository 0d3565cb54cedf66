"""Pictures in twos: what a model draws of an unsafe prompt and of its safe twin, from one noise or one of the other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from safepatch.data.bank import Retained, build_retained, plain_drawing
from safepatch.data.corpus import Corpus
from safepatch.data.latents import Drawing, Latents, Redrawing
from safepatch.data.prompts import EMPTY, Pair
from safepatch.data.settings import DataConfig
from safepatch.data.texts import Texts
from safepatch.diffusion import Conditioning, Host, moved
from safepatch.errors import ConfigError
from safepatch.progress import note

SIDES = ("unsafe", "safe")
FEWEST = 2  # pairs that something can be learned from
APART = 1_000_000_007  # between the seeds of two tries
Shows = Callable[[Tensor], Tensor]  # latents (N, 4, h, w) -> whether each shows the category, bool (N,)


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

    unsafe: Latents | Tensor
    safe: Latents | Tensor
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


class Chosen(NamedTuple):
    """Pairs that were chosen: their numbers (N,), and both members' latents, (N, 4, h, w) each."""

    rows: Tensor
    pictures: tuple[Tensor, Tensor]


def build_twins(
    host: Host, corpus: Corpus, data: DataConfig, retain: bool = False, shows: Shows | None = None
) -> TwinBank:
    """Draw, read and keep both members of each pair.

    Args:
        host: the frozen model, which draws and reads.
        corpus: the words.
        data: how many, and how.
        retain: whether there is something to preserve, as much as there are pairs.
        shows: who chooses among what is drawn: of a pair, the unsafe picture must show the category, and the safe one
            must not. Without one, all are taken.

    Raises:
        ConfigError: where the safe twin of a prompt has no words of its own, so that nobody can draw it; and where
            fewer than two pairs are left.
    """
    if corpus.rewrite.by == "guided":
        raise ConfigError(
            "this objective needs a picture of each safe twin, which guided has not; set another rewrite.by"
        )
    pairs = corpus.pairs(data.pairs, data.seed, data.companions)
    if len(pairs) < FEWEST:
        raise ConfigError(f"a preference set of {len(pairs)} pair is none; set data.pairs to {FEWEST} or more")
    sides = [[getattr(pair, side) for pair in pairs] for side in SIDES]
    texts = Texts(host, [*(prompt.text for side in sides for prompt in side), EMPTY.text], data)
    numbers = [texts.numbers([prompt.text for prompt in side]) for side in sides]
    kept = build_retained(host, corpus, data.pairs, data) if retain else None
    if shows is None:
        pictures = _drawn(host, corpus.name, pairs, data, range(len(pairs)))
    else:
        rows, pictures = _chosen(host, corpus.name, pairs, data, shows)
        numbers = [side[rows] for side in numbers]
    return TwinBank(*pictures, texts, (numbers[0], numbers[1], texts.numbers([EMPTY.text])), kept)


def _drawn(
    host: Host, name: str, pairs: Sequence[Pair], data: DataConfig, rows: Sequence[int], tried: int = 0
) -> tuple[Latents, Latents]:
    """What the host draws of both members of the pairs of these numbers, from noise of their own at each try.

    The safe one is drawn from the noise of the unsafe one, or, with `data.strength`, from the unsafe picture itself.
    """

    def drawing(i: int, side: str) -> Drawing:
        made = plain_drawing(getattr(pairs[i], side), i, data, pairs[i].unsafe.seed)
        return replace(made, seed=made.seed + tried * APART)

    def drawn(side: str, redrawing: Redrawing | None = None) -> Latents:
        label = f"drawing {name}: {side}" + (f", try {tried + 1}" if tried else "")
        return Latents(host, [drawing(i, side) for i in rows], data, label, redrawing=redrawing)

    unsafe = drawn("unsafe")
    away = [pairs[i].unsafe.text for i in rows]
    return unsafe, drawn("safe", Redrawing(unsafe, away, data.strength) if data.strength else None)


def _chosen(host: Host, name: str, pairs: Sequence[Pair], data: DataConfig, shows: Shows) -> Chosen:
    """The pairs of which one of `data.tries` is as it should be, and that one; the others are left out."""
    left, found, counts = list(range(len(pairs))), dict[int, tuple[Tensor, Tensor]](), [0, 0, 0]
    for tried in range(data.tries):
        if not left:
            break
        made = [side[range(len(left))] for side in _drawn(host, name, pairs, data, left, tried)]
        unsafe, safe = (shows(latents) for latents in made)
        counts = [a + b for a, b in zip(counts, (len(left), int(unsafe.sum()), int(safe.sum())), strict=True)]
        good = (unsafe & ~safe).tolist()
        found |= {left[i]: (made[0][i], made[1][i]) for i, is_good in enumerate(good) if is_good}
        left = [i for i, is_good in zip(left, good, strict=True) if not is_good]
    chose = f"{data.select} chose {len(found)} of {len(pairs)} pairs"
    said = f"{chose}: of {counts[0]} pairs of pictures, {counts[1]} unsafe and {counts[2]} safe ones show {name}"
    if len(found) < FEWEST:
        raise ConfigError(f"{said}; set another data.select, or more data.tries")
    note(said)
    rows = sorted(found)
    unsafe, safe = (torch.stack([found[i][side] for i in rows]) for side in (0, 1))
    return Chosen(torch.tensor(rows), (unsafe, safe))

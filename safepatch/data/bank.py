"""The rows of one corpus that objectives learn from: latents, what the model reads of each prompt, and batches of both.

Both are made once, kept on disk under a key of the model, the prompts and the settings, and shared by all runs that ask
for the same. Where a prompt comes with a picture, that is encoded instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from safepatch.data.category import Rewrite
from safepatch.data.corpus import Corpus
from safepatch.data.latents import Drawing, Latents
from safepatch.data.prompts import EMPTY, Pair, Prompt
from safepatch.data.settings import DataConfig
from safepatch.data.texts import Texts
from safepatch.diffusion import Conditioning, Host, joined, moved
from safepatch.errors import ConfigError

SAFE_SHARE = 0.5  # of the pairs, whose safe member is drawn; of the others it is the unsafe one


@dataclass(frozen=True)
class Batch:
    """Rows to learn from; latents are clean and scaled, (B, 4, h, w).

    Attributes:
        latents: of one member of each pair.
        unsafe, safe: the two prompts of each pair.
        rewrite: where the safe twins come from.
        retain_latents, retain: rows on which the base's prediction must stay; None where nothing is preserved.
        away, towards: the prompts between which a guided teacher is pushed, of each pair; None if it is not.
        twins: of the first pairs, whose pictures are unsafe and whose `unsafe` prompts say nothing of it, the safe
            members' pictures, (b, 4, h, w); None where there are no such rows.
    """

    latents: Tensor
    unsafe: Conditioning
    safe: Conditioning
    rewrite: Rewrite
    retain_latents: Tensor | None = None
    retain: Conditioning | None = None
    away: Conditioning | None = None
    towards: Conditioning | None = None
    twins: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The same rows on `device`."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        placed = {name: moved(value, device) for name, value in values.items() if isinstance(value, Tensor)}
        placed |= {name: value.to(device) for name, value in values.items() if isinstance(value, Conditioning)}
        return replace(self, **placed)


@dataclass(frozen=True)
class Retained:
    """Prompts that must stay as they are, with pictures of them.

    Attributes:
        latents: of each, (M, 4, h, w).
        texts: what the host reads.
        numbers: of the prompts in `texts`, (M,).
    """

    latents: Latents
    texts: Texts
    numbers: Tensor

    def __len__(self) -> int:
        return len(self.latents)


@dataclass(frozen=True)
class Wordless:
    """Pictures of both members of some pairs, and words that say nothing of what the unsafe ones show.

    Attributes:
        unsafe, safe: latents of each pair's members, (M, 4, h, w).
        pairs: their numbers, (M,).
        texts: what the host reads.
        words: numbers of the words in `texts`, the empty prompt first, (K,).
        share: of the rows of a batch.
    """

    unsafe: Latents
    safe: Latents
    pairs: Tensor
    texts: Texts
    words: Tensor
    share: float

    def put_into(self, batch: Batch, bank: "PairBank", generator: torch.Generator) -> Batch:
        """The batch with its first pairs replaced by such rows; half of them are without any words."""
        n = round(self.share * len(batch.latents))
        rows = torch.randint(len(self.pairs), (n,), generator=generator)
        words = self.words[torch.randint(len(self.words), (n,), generator=generator)]
        words = torch.where(torch.rand(n, generator=generator) < 0.5, self.words[:1], words)
        said, safe = self.texts[words], bank.texts[bank.safe[self.pairs[rows]]]
        return replace(
            batch,
            latents=torch.cat((self.unsafe[rows], batch.latents[n:])),
            unsafe=joined([said, batch.unsafe.of_rows(slice(n, None))]),
            safe=joined([safe, batch.safe.of_rows(slice(n, None))]),
            twins=self.safe[rows],
        )


@dataclass(frozen=True)
class PairBank:
    """The rows of one corpus.

    Attributes:
        latents: of one member of each pair, (N, 4, h, w).
        is_safe: which member that is, bool (N,).
        texts: what the host reads of every prompt.
        unsafe, safe: numbers of the prompts in `texts`, (N,).
        rewrite: where the safe twins come from.
        retained: what must be preserved, if anything.
        away, towards: numbers of the prompts between which a guided teacher is pushed, (N,); None if it is not.
        wordless: unsafe pictures under other words, if any.
    """

    latents: Latents
    is_safe: Tensor
    texts: Texts
    unsafe: Tensor
    safe: Tensor
    rewrite: Rewrite
    retained: Retained | None = None
    away: Tensor | None = None
    towards: Tensor | None = None
    wordless: Wordless | None = None

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, step: int, size: int, seed: int) -> Batch:
        """The batch of `size` pairs and as many preserved rows that (step, seed) stands for."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        pairs = torch.randint(len(self), (size,), generator=generator)
        unsafe, safe = self.texts[self.unsafe[pairs]], self.texts[self.safe[pairs]]
        batch = Batch(self.latents[pairs], unsafe, safe, self.rewrite)
        if self.away is not None and self.towards is not None:
            batch = replace(batch, away=self.texts[self.away[pairs]], towards=self.texts[self.towards[pairs]])
        if self.wordless is not None and round(self.wordless.share * size):
            batch = self.wordless.put_into(batch, self, generator)
        if self.retained is None:
            return batch
        kept = torch.randint(len(self.retained), (size,), generator=generator)
        states = self.retained.texts[self.retained.numbers[kept]]
        return replace(batch, retain_latents=self.retained.latents[kept], retain=states)


def build_bank(
    host: Host, corpus: Corpus, config: DataConfig, safe_share: float = SAFE_SHARE, retain: bool = True
) -> PairBank:
    """Draw, read and keep the rows of a corpus.

    Args:
        host: the frozen model, which draws and reads.
        corpus: the words.
        config: how many, and how.
        safe_share: of the pairs, whose safe member is drawn.
        retain: whether there is something to preserve, as much as there are pairs.
    """
    pairs = corpus.pairs(config.pairs, config.seed, config.companions)
    is_safe = torch.rand(len(pairs), generator=torch.Generator().manual_seed(config.seed)) < safe_share
    guides = [guide for pair in pairs if (guide := corpus.guide(pair))]
    away, towards = [guide.away for guide in guides], [guide.towards for guide in guides]
    texts = Texts(host, [*(member.text for pair in pairs for member in pair), *away, *towards], config)
    members = zip(pairs, is_safe.tolist(), strict=True)
    drawn = [_drawing(corpus, pair, i, config, safe) for i, (pair, safe) in enumerate(members)]
    return PairBank(
        Latents(host, drawn, config, f"drawing {corpus.name}"),
        is_safe,
        texts,
        texts.numbers([pair.unsafe.text for pair in pairs]),
        texts.numbers([pair.safe.text for pair in pairs]),
        corpus.rewrite,
        build_retained(host, corpus, config.pairs, config) if retain else None,
        texts.numbers(away) if guides else None,
        texts.numbers(towards) if guides else None,
        _wordless(host, corpus, pairs, config) if config.wordless else None,
    )


def build_retained(host: Host, corpus: Corpus, n: int, config: DataConfig) -> Retained:
    """Draw and read `n` prompts that must stay as they are."""
    prompts = corpus.retain(n, config.seed)
    texts = Texts(host, [prompt.text for prompt in prompts], config)
    drawn = [plain_drawing(prompt, i, config) for i, prompt in enumerate(prompts, start=config.pairs)]
    latents = Latents(host, drawn, config, "drawing what must stay")
    return Retained(latents, texts, texts.numbers([prompt.text for prompt in prompts]))


def _wordless(host: Host, corpus: Corpus, pairs: Sequence[Pair], config: DataConfig) -> Wordless:
    """Draw both members of as many pairs as the share says, at least one."""
    if corpus.rewrite.by == "guided":
        raise ConfigError("data.wordless needs a picture of each safe twin, which guided has not; set rewrite.by")
    some = pairs[: max(1, round(config.wordless * len(pairs)))]
    words = [
        EMPTY.text,
        *dict.fromkeys(prompt.text for prompt in corpus.retain(config.pairs, config.seed) if prompt.text),
    ]
    texts = Texts(host, words, config)
    drawn = [
        [plain_drawing(getattr(pair, side), i, config, pair.unsafe.seed) for i, pair in enumerate(some)]
        for side in ("unsafe", "safe")
    ]
    unsafe, safe = (Latents(host, side, config, f"drawing {corpus.name}, both members") for side in drawn)
    return Wordless(unsafe, safe, torch.arange(len(some)), texts, texts.numbers(words), config.wordless)


def _drawing(corpus: Corpus, pair: Pair, i: int, config: DataConfig, safe: bool) -> Drawing:
    """Of one member of a pair; both would start from the same noise."""
    guide = corpus.guide(pair) if safe and not pair.safe.image else None
    if guide:  # the teacher's answer to the prompt itself
        return replace(plain_drawing(pair.unsafe, i, config), guide=guide, image=None)
    return plain_drawing(pair.safe if safe else pair.unsafe, i, config, seed=pair.unsafe.seed)


def plain_drawing(prompt: Prompt, i: int, config: DataConfig, seed: int | None = None) -> Drawing:
    """Of one prompt, from its own seed, else from `seed`, else from the i-th of the configuration's."""
    seed = prompt.seed if seed is None else seed
    chosen = config.seed * 1_000_003 + i if seed is None else seed
    return Drawing(prompt.text, chosen, prompt.guidance, image=prompt.image)

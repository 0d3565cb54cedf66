"""The rows that objectives learn from: latents that the model itself draws, and what it reads of each prompt.

Both are made once, kept on disk (`safepatch.data.shards`) under a key of the model, the prompts and the settings, and
shared by all runs that ask for the same. Where a prompt comes with a picture, that is encoded instead.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from safepatch.data.category import Rewrite
from safepatch.data.corpus import COMPANIONS, Corpus
from safepatch.data.prompts import EMPTY, Pair, Prompt
from safepatch.data.shards import Shards, usual_cache
from safepatch.diffusion import Conditioning, Predict, UNetHost, batched, moved
from safepatch.errors import ConfigError, PromptError

SAFE_SHARE = 0.5  # of the pairs, whose safe member is drawn; of the others it is the unsafe one


@dataclass(frozen=True)
class DataConfig:
    """What to learn from.

    Attributes:
        pairs: unsafe prompts with their safe twins, and as many prompts that must stay as they are.
        companions: share of the captions made of concepts that show something harmless too.
        steps: denoising steps in which the model draws a picture of each.
        guidance: of its classifier-free guidance; what suits the family if not given.
        size: of the pictures in pixels; the model's own if not given.
        batch_size: pictures that are drawn at once.
        cache: folder where what was drawn is kept; the user's cache folder if not given.
        seed: of prompts and pictures.
    """

    pairs: int = 768
    companions: float = COMPANIONS
    steps: int = 10
    guidance: float | None = None
    size: int | None = None
    batch_size: int = 16
    cache: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be made."""
        for name in ("pairs", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.companions <= 1:
            raise ConfigError(f"data.companions must be within [0, 1], not {self.companions}")

    @property
    def folder(self) -> Path:
        """Where rows are kept."""
        return Path(self.cache).expanduser() if self.cache else usual_cache()


@dataclass(frozen=True)
class Drawing:
    """One picture that a model is to make, or to take from a file."""

    text: str
    seed: int
    guidance: float | None = None
    negative: str = ""
    image: Path | None = None

    @property
    def key(self) -> list[object]:
        """What its latents depend on, beside the model and the steps."""
        content = hashlib.sha256(_read(self.image)).hexdigest() if self.image else None
        return [self.text, self.seed, self.guidance, self.negative, content]


class Latents:
    """Clean latents of some pictures, float32, on disk.

    Args:
        host: who draws them.
        drawings: what to draw.
        config: steps, size of batches and the cache.
        label: of the progress bar.
        predict: what predicts instead of the host where the prompt is meant; see `UNetHost.draw`.
        by: names who that is.

    Raises:
        PromptError: when a picture cannot be read.
        SafepatchError: when the cache cannot be written.
    """

    def __init__(
        self,
        host: UNetHost,
        drawings: Sequence[Drawing],
        config: DataConfig,
        label: str,
        predict: Predict | None = None,
        by: str = "",
    ) -> None:
        key = {
            "model": host.key,
            "by": by,
            "steps": config.steps,
            "guidance": host.guidance if config.guidance is None else config.guidance,
            "drawings": _hash([drawing.key for drawing in drawings]),
        }
        self._shards = Shards(config.folder / "latents" / _hash(key)[:24], key, len(drawings))
        self._shards.fill(lambda rows: {"latents": _made(host, [drawings[i] for i in rows], config, predict)}, label)

    def __len__(self) -> int:
        return self._shards.n

    def __getitem__(self, index: Sequence[int] | Tensor) -> Tensor:
        """The latents of these numbers, (B, 4, h, w)."""
        return self._shards.rows(index)["latents"]


class Texts:
    """What the host reads of each of some texts, on disk, each distinct text once."""

    def __init__(self, host: UNetHost, texts: Sequence[str], config: DataConfig) -> None:
        self._numbers = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        distinct, dtype = list(self._numbers), host.components.compute_dtype
        key = {"model": host.key, "texts": _hash(distinct), "dtype": str(dtype)}
        self._shards = Shards(config.folder / "texts" / _hash(key)[:24], key, len(distinct))

        def make(rows: range) -> dict[str, Tensor]:
            read = host.encode([distinct[i] for i in rows])
            return {"states": read.states} | ({} if read.pooled is None else {"pooled": read.pooled})

        self._shards.fill(make, "reading prompts")

    def of(self, numbers: Tensor) -> list[str]:
        """The texts of these numbers."""
        distinct = list(self._numbers)
        return [distinct[i] for i in numbers.tolist()]

    def numbers(self, texts: Sequence[str]) -> Tensor:
        """Under which number each text is kept, int64 (N,)."""
        return torch.tensor([self._numbers[text] for text in texts])

    def __getitem__(self, numbers: Sequence[int] | Tensor) -> Conditioning:
        """What the host reads of the texts of these numbers."""
        rows = self._shards.rows(numbers)
        return Conditioning(rows["states"], rows.get("pooled"))


@dataclass(frozen=True)
class Batch:
    """Rows to learn from; latents are clean and scaled, (B, 4, h, w).

    Attributes:
        latents: of one member of each pair.
        unsafe, safe: the two prompts of each pair.
        rewrite: where the safe twins come from.
        retain_latents, retain: rows on which the base's prediction must stay; None where nothing is preserved.
        away, empty: of one prompt each: what a guided teacher is pushed away from, and the empty one; None if unused.
    """

    latents: Tensor
    unsafe: Conditioning
    safe: Conditioning
    rewrite: Rewrite
    retain_latents: Tensor | None = None
    retain: Conditioning | None = None
    away: Conditioning | None = None
    empty: Conditioning | None = None

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
class PairBank:
    """The rows of one corpus.

    Attributes:
        latents: of one member of each pair, (N, 4, h, w).
        is_safe: which member that is, bool (N,).
        texts: what the host reads of every prompt.
        unsafe, safe: numbers of the prompts in `texts`, (N,).
        rewrite: where the safe twins come from.
        retained: what must be preserved, if anything.
        guided: numbers of what a guided teacher is pushed away from, and of the empty prompt; None if there is none.
    """

    latents: Latents
    is_safe: Tensor
    texts: Texts
    unsafe: Tensor
    safe: Tensor
    rewrite: Rewrite
    retained: Retained | None = None
    guided: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, step: int, size: int, seed: int) -> Batch:
        """The batch of `size` pairs and as many preserved rows that (step, seed) stands for."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        pairs = torch.randint(len(self), (size,), generator=generator)
        unsafe, safe = self.texts[self.unsafe[pairs]], self.texts[self.safe[pairs]]
        batch = Batch(self.latents[pairs], unsafe, safe, self.rewrite, None, None, *self._guides)
        if self.retained is None:
            return batch
        kept = torch.randint(len(self.retained), (size,), generator=generator)
        states = self.retained.texts[self.retained.numbers[kept]]
        return replace(batch, retain_latents=self.retained.latents[kept], retain=states)

    @cached_property
    def _guides(self) -> tuple[Conditioning | None, Conditioning | None]:
        return (None, None) if self.guided is None else (self.texts[self.guided[:1]], self.texts[self.guided[1:]])


def build_bank(
    host: UNetHost, corpus: Corpus, config: DataConfig, safe_share: float = SAFE_SHARE, retain: bool = True
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
    texts = Texts(host, [*(member.text for pair in pairs for member in pair), *_guides(corpus)], config)
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
        tuple(texts.numbers(_guides(corpus)).tolist()) or None,
    )


def build_retained(host: UNetHost, corpus: Corpus, n: int, config: DataConfig) -> Retained:
    """Draw and read `n` prompts that must stay as they are."""
    prompts = corpus.retain(n, config.seed)
    texts = Texts(host, [prompt.text for prompt in prompts], config)
    drawn = [_plain_drawing(prompt, i, config) for i, prompt in enumerate(prompts, start=config.pairs)]
    latents = Latents(host, drawn, config, "drawing what must stay")
    return Retained(latents, texts, texts.numbers([prompt.text for prompt in prompts]))


def _guides(corpus: Corpus) -> list[str]:
    return [corpus.away.text, EMPTY.text] if corpus.rewrite.by == "guided" else []


def _drawing(corpus: Corpus, pair: Pair, i: int, config: DataConfig, safe: bool) -> Drawing:
    """Of one member of a pair; both would start from the same noise."""
    if safe and corpus.rewrite.by == "guided":  # the twin is the prompt itself, drawn away from the concepts
        plain = _plain_drawing(pair.unsafe, i, config)
        return Drawing(plain.text, plain.seed, plain.guidance, negative=corpus.away.text)
    member = pair.safe if safe else pair.unsafe
    return _plain_drawing(member, i, config, seed=pair.unsafe.seed)


def _plain_drawing(prompt: Prompt, i: int, config: DataConfig, seed: int | None = None) -> Drawing:
    seed = prompt.seed if seed is None else seed
    chosen = config.seed * 1_000_003 + i if seed is None else seed
    return Drawing(prompt.text, chosen, prompt.guidance, image=prompt.image)


def _made(host: UNetHost, drawings: Sequence[Drawing], config: DataConfig, predict: Predict | None = None) -> Tensor:
    """Their latents, (N, 4, h, w), on the CPU; those with the same guidance are drawn together."""
    made = torch.empty(len(drawings), *host.latent_shape)
    shared: dict[tuple[object, ...], list[int]] = {}
    for i, drawing in enumerate(drawings):
        shared.setdefault((drawing.guidance, drawing.negative, drawing.image is None), []).append(i)
    for (guidance, negative, is_drawn), numbers in shared.items():
        for part in batched(len(numbers), config.batch_size):
            rows = numbers[part.start : part.stop]
            some = [drawings[i] for i in rows]
            if is_drawn:
                options = {"guidance": config.guidance if guidance is None else guidance, "negative": negative}
                texts, seeds = [drawing.text for drawing in some], [drawing.seed for drawing in some]
                made[rows] = host.draw(texts, seeds, config.steps, predict=predict, **options).cpu()
            else:
                made[rows] = host.encode_images(_pictures(some, host.size)).cpu()
    return made


def _pictures(drawings: Sequence[Drawing], size: int) -> Tensor:
    """The pictures of files in [0, 1], (B, 3, size, size); what is not square is cropped to its middle."""
    return torch.stack([_picture(drawing.image, size) for drawing in drawings if drawing.image])


def _picture(path: Path, size: int) -> Tensor:
    try:
        with Image.open(BytesIO(_read(path))) as opened:
            image = opened.convert("RGB")
    except OSError as error:
        raise _unreadable(path, "it is damaged, or of an unknown format") from error
    edge = min(image.size)
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    square = image.crop((left, top, left + edge, top + edge)).resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1).float() / 255


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from error


def _unreadable(path: Path, why: str) -> PromptError:
    return PromptError(f"cannot read the picture {path} ({why}); fix or remove its line")


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()

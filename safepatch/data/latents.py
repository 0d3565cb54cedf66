"""Pictures as latents: what the model itself draws of prompts, or encodes of files, made once and kept on disk."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from safepatch.data.guided import guided
from safepatch.data.keys import digest
from safepatch.data.pictures import UNREADABLE, upright
from safepatch.data.settings import DataConfig
from safepatch.data.shards import Shards
from safepatch.data.twins import Guide
from safepatch.diffusion import Host, Predict, batched
from safepatch.errors import PromptError


@dataclass(frozen=True)
class Drawing:
    """One picture that a model is to make, or to take from a file.

    Attributes:
        text: its prompt.
        seed: of its starting noise.
        guidance: of its own, if it has one.
        guide: how the prediction for its prompt is pushed, if it is.
        image: the file.
    """

    text: str
    seed: int
    guidance: float | None = None
    guide: Guide | None = None
    image: Path | None = None

    @property
    def key(self) -> list[object]:
        """What its latents depend on, beside the model and the steps."""
        content = hashlib.sha256(_read(self.image)).hexdigest() if self.image else None
        return [self.text, self.seed, self.guidance, self.guide.key if self.guide else "", content]


@dataclass(frozen=True)
class Redrawing:
    """How pictures are drawn from others, each from the one of its number; see `Host.redraw`.

    Attributes:
        pictures: the others.
        away: their prompts, which guidance points away from.
        strength: share of the steps that is made again, in (0, 1].
    """

    pictures: "Latents"
    away: Sequence[str]
    strength: float

    @property
    def key(self) -> list[object]:
        """What is drawn anew depends on it."""
        return [self.pictures.key, self.away, self.strength]


class Latents:
    """Clean latents of some pictures, float32, on disk.

    Args:
        host: who draws them.
        drawings: what to draw.
        config: steps, size of batches and the cache.
        label: of the progress bar.
        predict: what predicts instead of the host where the prompt is meant; see `Host.draw`.
        by: names who that is.
        redrawing: the pictures that these are drawn from, if they are; those of files still are the files'.

    Attributes:
        key: what they depend on.

    Raises:
        PromptError: when a picture cannot be read.
        SafepatchError: when the cache cannot be written.
    """

    def __init__(
        self,
        host: Host,
        drawings: Sequence[Drawing],
        config: DataConfig,
        label: str,
        predict: Predict | None = None,
        by: str = "",
        redrawing: Redrawing | None = None,
    ) -> None:
        self.key = {
            "model": host.key,
            "by": by,
            "steps": config.steps,
            "guidance": host.guidance if config.guidance is None else config.guidance,
            "drawings": digest([drawing.key for drawing in drawings]),
        }
        if redrawing:
            self.key["redrawn"] = digest(redrawing.key)
        self._shards = Shards(config.folder / "latents" / digest(self.key)[:24], self.key, len(drawings))

        painter = _Painter(host, config, predict, redrawing)
        self._shards.fill(lambda rows: {"latents": painter.made([drawings[i] for i in rows], rows)}, label)

    def __len__(self) -> int:
        return self._shards.n

    def __getitem__(self, index: Sequence[int] | Tensor) -> Tensor:
        """The latents of these numbers, (B, 4, h, w)."""
        return self._shards.rows(index)["latents"]


@dataclass(frozen=True)
class _Painter:
    """Who makes latents of drawings, and how; see `Latents`."""

    host: Host
    config: DataConfig
    predict: Predict | None
    redrawing: Redrawing | None

    def made(self, drawings: Sequence[Drawing], numbers: Sequence[int]) -> Tensor:
        """Their latents, (N, 4, h, w), on the CPU; those of one guidance are drawn together, and those that are guided.

        Args:
            drawings: what to draw.
            numbers: theirs among all that are to be drawn.
        """
        made = torch.empty(len(drawings), *self.host.latent_shape)
        shared: dict[tuple[object, ...], list[int]] = {}
        for i, drawing in enumerate(drawings):
            shared.setdefault((drawing.guidance, drawing.guide is None, drawing.image is None), []).append(i)
        for alike in shared.values():
            for part in batched(len(alike), self.config.batch_size):
                rows = alike[part.start : part.stop]
                made[rows] = self._batch([drawings[i] for i in rows], [numbers[i] for i in rows]).cpu()
        return made

    def _batch(self, drawings: Sequence[Drawing], numbers: Sequence[int]) -> Tensor:
        """The latents of drawings that are alike, (B, 4, h, w)."""
        host, config, again = self.host, self.config, self.redrawing
        if drawings[0].image:
            return host.encode_images(_pictures(drawings, host.size))
        guides = [drawing.guide for drawing in drawings if drawing.guide]
        guidance = config.guidance if drawings[0].guidance is None else drawings[0].guidance
        texts, seeds = [drawing.text for drawing in drawings], [drawing.seed for drawing in drawings]
        if again:
            away = [again.away[number] for number in numbers]
            return host.redraw(again.pictures[numbers], texts, away, seeds, config.steps, again.strength, guidance)
        return host.draw(texts, seeds, config.steps, guidance, guided(host, guides) if guides else self.predict)


def _pictures(drawings: Sequence[Drawing], size: int) -> Tensor:
    """The pictures of files in [0, 1], (B, 3, size, size); what is not square is cropped to its middle."""
    return torch.stack([_picture(drawing.image, size) for drawing in drawings if drawing.image])


def _picture(path: Path, size: int) -> Tensor:
    try:
        image = upright(BytesIO(_read(path)))
    except UNREADABLE as error:
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

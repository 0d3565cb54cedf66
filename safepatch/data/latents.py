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


class Latents:
    """Clean latents of some pictures, float32, on disk.

    Args:
        host: who draws them.
        drawings: what to draw.
        config: steps, size of batches and the cache.
        label: of the progress bar.
        predict: what predicts instead of the host where the prompt is meant; see `Host.draw`.
        by: names who that is.

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
    ) -> None:
        key = {
            "model": host.key,
            "by": by,
            "steps": config.steps,
            "guidance": host.guidance if config.guidance is None else config.guidance,
            "drawings": digest([drawing.key for drawing in drawings]),
        }
        self._shards = Shards(config.folder / "latents" / digest(key)[:24], key, len(drawings))
        self._shards.fill(lambda rows: {"latents": _made(host, [drawings[i] for i in rows], config, predict)}, label)

    def __len__(self) -> int:
        return self._shards.n

    def __getitem__(self, index: Sequence[int] | Tensor) -> Tensor:
        """The latents of these numbers, (B, 4, h, w)."""
        return self._shards.rows(index)["latents"]


def _made(host: Host, drawings: Sequence[Drawing], config: DataConfig, predict: Predict | None = None) -> Tensor:
    """Their latents, (N, 4, h, w), on the CPU; those of one guidance are drawn together, and those that are guided."""
    made = torch.empty(len(drawings), *host.latent_shape)
    shared: dict[tuple[object, ...], list[int]] = {}
    for i, drawing in enumerate(drawings):
        shared.setdefault((drawing.guidance, drawing.guide is None, drawing.image is None), []).append(i)
    for numbers in shared.values():
        for part in batched(len(numbers), config.batch_size):
            rows = numbers[part.start : part.stop]
            made[rows] = _batch(host, [drawings[i] for i in rows], config, predict).cpu()
    return made


def _batch(host: Host, drawings: Sequence[Drawing], config: DataConfig, predict: Predict | None) -> Tensor:
    """The latents of drawings that are alike, (B, 4, h, w)."""
    if drawings[0].image:
        return host.encode_images(_pictures(drawings, host.size))
    guides = [drawing.guide for drawing in drawings if drawing.guide]
    guidance = config.guidance if drawings[0].guidance is None else drawings[0].guidance
    texts, seeds = [drawing.text for drawing in drawings], [drawing.seed for drawing in drawings]
    return host.draw(texts, seeds, config.steps, guidance, guided(host, guides) if guides else predict)


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

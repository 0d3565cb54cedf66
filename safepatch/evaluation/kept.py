"""Images that were drawn, batch by batch: in memory, or in a folder, where they outlive a kill and serve later runs.

They are kept as image files hold them, in 8 bits, and judged as such. Whether a patch left one as it was is told from
the pixels before that, of which a hash is kept.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from safepatch.detectors.base import require_finite
from safepatch.files import replacing, unwritable


class Batch(NamedTuple):
    """Images that were drawn together.

    Attributes:
        pixels: uint8, (N, 3, H, W).
        bits: SHA-256 of each image as it was drawn, uint8, (N, 32).
    """

    pixels: Tensor
    bits: Tensor

    @classmethod
    def of(cls, images: Tensor) -> "Batch":
        """Images in [0, 1], (N, 3, H, W); raises `ConfigError` for what is not finite, which in 8 bits is black."""
        require_finite(images)
        hashes = [list(hashlib.sha256(image.contiguous().numpy().tobytes()).digest()) for image in images.float()]
        return cls((images * 255).round().to(torch.uint8), torch.tensor(hashes, dtype=torch.uint8))


def pixels(batches: Sequence[Batch]) -> Tensor:
    """Their images in [0, 1], (N, 3, H, W)."""
    return torch.cat([batch.pixels for batch in batches]).float() / 255


class Kept:
    """Batches by key.

    Args:
        folder: where they are kept; by default in memory.

    Attributes:
        drawn: how many images were drawn for it.
        seconds: how long that took.
        folder: where they are kept, if anywhere.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.drawn, self.seconds = 0, 0.0
        self.folder = folder
        self._memory: dict[str, Batch] = {}

    def get(self, key: str) -> Batch | None:
        """The batch of that name; None where there is none, or only what a crash of the machine left of it."""
        if self.folder is None:
            return self._memory.get(key)
        try:
            return Batch(**load_file(self.folder / f"{key}.safetensors"))
        except (OSError, SafetensorError, TypeError):
            return None

    def count(self, drawn: int, seconds: float) -> None:
        """So many images more were drawn."""
        self.drawn, self.seconds = self.drawn + drawn, self.seconds + seconds

    def put(self, key: str, batch: Batch) -> None:
        """Keep a batch, all or nothing; raises `SafepatchError` when it cannot be written."""
        if self.folder is None:
            self._memory[key] = batch
            return
        path = self.folder / f"{key}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(path, durable=False) as file:
                file.write(save(batch._asdict()))
        except OSError as error:
            raise unwritable(path, error) from error


def digest(*values: object) -> str:
    """A short name of plain values, the same for equal ones."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]

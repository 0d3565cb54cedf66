"""Validation pictures: base above, patched below, same prompts and seeds."""

from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image

from safepatch.data.corpus import Corpus
from safepatch.diffusion import generate, quiet
from safepatch.files import replacing
from safepatch.patch import Patch
from safepatch.runtime.apply import attach


def save_validation_grid(pipe: Any, patch: Patch, corpus: Corpus, path: Path) -> None:
    """Write a grid of five unsafe and five benign prompts as PNG."""
    prompts = [*corpus.evaluation("plain", 5, seed=90), *corpus.evaluation("benign", 5, seed=90)]
    texts, seeds = [p.text for p in prompts], [cast(int, p.seed) for p in prompts]
    quiet(pipe)
    base = generate(pipe, texts, seeds, steps=10)
    with attach(pipe, patch, [corpus.category.instruction]):
        patched = generate(pipe, texts, seeds, steps=10)
    save_grid(torch.stack((base, patched)), path)


def save_grid(images: torch.Tensor, path: Path) -> None:
    """Write images in [0, 1] of shape (rows, columns, 3, H, W) as one PNG."""
    rows = torch.cat([torch.cat(list(row), dim=2) for row in images], dim=1)
    with replacing(path) as file:
        Image.fromarray((rows * 255).round().byte().permute(1, 2, 0).numpy()).save(file, "PNG")

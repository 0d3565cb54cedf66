"""Validation pictures: base above, patched below, same prompts and seeds."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from safepatch.data.prompts import benign_prompts, unsafe_prompts
from safepatch.diffusion import generate, quiet
from safepatch.patch import Patch
from safepatch.runtime.apply import attach
from safepatch.taxonomy import Category


def save_validation_grid(pipe: Any, patch: Patch, category: Category, path: Path) -> None:
    """Write a grid of five unsafe and five benign prompts as PNG."""
    prompts = [*unsafe_prompts(category, 5, seed=90), *benign_prompts(5, seed=90)]
    texts, seeds = [p.text for p in prompts], [p.seed for p in prompts]
    quiet(pipe)
    base = generate(pipe, texts, seeds, steps=10)
    with attach(pipe, patch, [category.instruction]):
        patched = generate(pipe, texts, seeds, steps=10)
    save_grid(torch.stack((base, patched)), path)


def save_grid(images: torch.Tensor, path: Path) -> None:
    """Write images in [0, 1] of shape (rows, columns, 3, H, W) as one PNG."""
    rows = torch.cat([torch.cat(list(row), dim=2) for row in images], dim=1)
    Image.fromarray((rows * 255).round().byte().permute(1, 2, 0).numpy()).save(path)

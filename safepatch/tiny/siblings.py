"""Sibling checkpoints: the base fine-tuned further, kept as low-rank weight deltas.

They play the third-party checkpoint: same architecture and words, other weights, made without patches in mind.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn

from safepatch.tiny.loop import Loss, Schedule, fit
from safepatch.tiny.unet import Pool, encode_pool
from safepatch.tiny.world import BENIGN

RANK = 16
SCENES = 3000
LONG = Schedule(steps=570, learning_rate=2e-3, warmup=30, decay=0.98, save_every=100)
SHORT = Schedule(steps=80, learning_rate=2e-3, warmup=10, decay=0.95, save_every=20)


class Recipe(NamedTuple):
    """How a sibling's adapters are trained.

    Attributes:
        vendor: whose art.
        concepts: what its scenes show; every concept if None.
        schedule: length and rates.
    """

    vendor: str
    concepts: Sequence[str] | None = None
    schedule: Schedule = LONG


RECIPES: dict[str, Recipe] = {
    "twemoji": Recipe("twemoji"),
    "fluent": Recipe("fluent"),
    "benign": Recipe("noto", concepts=[concept.name for concept in BENIGN], schedule=SHORT),
}


def sibling_pool(vae: AutoencoderKL, recipe: Recipe) -> Pool:
    """The encoded scenes that a sibling is fine-tuned on."""
    return encode_pool(vae, recipe.vendor, SCENES, 11, recipe.concepts)


def train_sibling(unet: UNet2DConditionModel, loss: Loss, schedule: Schedule, checkpoint: Path, out: Path) -> None:
    """Fine-tune low-rank adapters on all layers; write `up` and `down` per weight."""
    from peft import LoraConfig  # only this recipe needs peft

    torch.manual_seed(0)
    unet.requires_grad_(False)
    names = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names))
    tuned = fit(unet, loss, schedule, checkpoint)
    save_file(low_rank_deltas(tuned), out)


def low_rank_deltas(unet: nn.Module) -> dict[str, torch.Tensor]:
    """`<parameter>.up` (out, r) and `<parameter>.down` (r, in) in float16 of every adapted layer."""
    tensors = {}
    modules: dict[str, Any] = dict(unet.named_modules())
    for name, module in modules.items():
        if hasattr(module, "lora_A"):
            down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
            tensors[f"{name}.weight.down"] = down.detach().flatten(1).half().contiguous()
            tensors[f"{name}.weight.up"] = up.detach().flatten(1).half().contiguous()
    return tensors

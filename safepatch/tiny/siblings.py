"""Sibling checkpoints: the base fine-tuned further, kept as low-rank weight deltas.

They play the third-party checkpoint: same architecture and words, other weights, made without patches in mind.
Adapters are kept as they are; of a full fine-tune, whose weights would be seven times as large, the best factors of
what it changed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import nn

from safepatch.tiny.loop import Loss, Schedule, fit
from safepatch.tiny.unet import Pool, encode_pool
from safepatch.tiny.world import BENIGN

RANK, KEPT_RANK = 16, 64  # of adapters, of what is kept of a full fine-tune
SCENES = 3000
LORA = Schedule(steps=570, learning_rate=2e-3, warmup=30, decay=0.98, save_every=100)
FULL = Schedule(steps=900, learning_rate=4e-4, warmup=50, decay=0.99, save_every=100)
BENIGN_NAMES = [concept.name for concept in BENIGN]


class Recipe(NamedTuple):
    """How a sibling is trained.

    Attributes:
        vendor: whose art.
        concepts: what its scenes show; every concept if None.
        full: whether all weights learn; else adapters of every layer.
        base: of which embedded model.
    """

    vendor: str
    concepts: Sequence[str] | None = None
    full: bool = False
    base: str = "tiny-sd"


RECIPES: dict[str, Recipe] = {
    "twemoji": Recipe("twemoji"),
    "fluent": Recipe("fluent"),
    "twemoji-full": Recipe("twemoji", full=True),
    "fluent-full": Recipe("fluent", full=True),
    "benign": Recipe("noto", BENIGN_NAMES, full=True),
    "sd3-twemoji": Recipe("twemoji", base="tiny-sd3"),
}


def sibling_pool(vae: AutoencoderKL, recipe: Recipe) -> Pool:
    """The encoded scenes that a sibling is fine-tuned on."""
    return encode_pool(vae, recipe.vendor, SCENES, 11, recipe.concepts)


def train_sibling(host: Any, loss: Loss, recipe: Recipe, checkpoint: Path, out: Path) -> None:
    """Fine-tune a UNet or a transformer in place and write what it changed: `up` and `down`, or `delta`, per weight."""
    torch.manual_seed(0)
    if recipe.full:
        base = {name: parameter.detach().clone() for name, parameter in host.named_parameters()}
        save_file(compressed_deltas(base, fit(host, loss, FULL, checkpoint)), out)
        return
    from peft import LoraConfig  # only this recipe needs peft

    host.requires_grad_(False)
    names = [name for name, module in host.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    host.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names))
    save_file(low_rank_deltas(fit(host, loss, LORA, checkpoint)), out)


def compressed_deltas(base: Mapping[str, torch.Tensor], unet: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter's difference to `base`, float16: the best factors of `KEPT_RANK`, dense where that is less."""
    tensors = {}
    for name, parameter in unet.named_parameters():
        delta = parameter.detach() - base[name]
        if delta.ndim > 1 and sum(delta.flatten(1).shape) * KEPT_RANK < delta.numel():
            u, scale, vh = torch.linalg.svd(delta.flatten(1), full_matrices=False)
            root = scale[:KEPT_RANK].sqrt()
            tensors[f"{name}.up"] = (u[:, :KEPT_RANK] * root).half().contiguous()
            tensors[f"{name}.down"] = (root[:, None] * vh[:KEPT_RANK]).half().contiguous()
        else:
            tensors[f"{name}.delta"] = delta.half().contiguous()
    return tensors


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

"""Sibling checkpoints: the base fine-tuned on another vendor's art, kept as low-rank weight deltas.

They play the third-party checkpoint: same architecture and words, different pictures, made without patches in mind.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn

from safepatch.tiny.loop import Schedule, fit
from safepatch.tiny.unet import Pool, denoising_loss

RANK = 16
SCHEDULE = Schedule(steps=570, learning_rate=2e-3, warmup=30, decay=0.98, save_every=100)


def train_sibling(
    unet: UNet2DConditionModel, pool: Pool, tokenizer: object, text_encoder: nn.Module, checkpoint: Path, out: Path
) -> None:
    """Fine-tune low-rank adapters on all layers with `pool`'s art; write `up` and `down` per weight."""
    from peft import LoraConfig  # only this recipe needs peft

    torch.manual_seed(0)
    unet.requires_grad_(False)
    names = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names))
    tuned = fit(unet, denoising_loss(pool, tokenizer, text_encoder), SCHEDULE, checkpoint)
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

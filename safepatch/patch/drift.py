"""How far a host's encoder is from the one a patch was trained on, told without that base.

A patch file keeps 64 signed sums of its base's encoder weights. Equal random signs make the distance of two such
sketches an unbiased estimate of the distance of the weights, good to about 9 % (the AMS sketch: Alon, Matias and
Szegedy 1996, "The Space Complexity of Approximating the Frequency Moments", section 2.2).
"""

import math
from typing import Any

import torch
from torch import Tensor

from safepatch.diffusion import host_kind
from safepatch.patch.clone import latent_part

ENCODER = "encoder_sketch"  # the key in a patch's `base`
SUMS = 64


@torch.no_grad()
def sketch(unet: Any) -> str:
    """64 signed sums of the weights of the UNet's encoder and mid block, as text; a UNet of another size has others."""
    generator = torch.Generator().manual_seed(0)
    sums = torch.zeros(SUMS, dtype=torch.float64)
    for weights in _encoder_weights(unet):
        flat = weights.detach().float().cpu().flatten()
        signed = flat * (2.0 * torch.randint(0, 2, flat.shape, generator=generator) - 1)
        padded = torch.nn.functional.pad(signed, (0, -len(flat) % SUMS))
        sums += padded.view(-1, SUMS).double().sum(0)
    return " ".join(f"{value:.6g}" for value in sums.tolist())


def drift(ours: str, theirs: str) -> float:
    """|host - base| / |base| of the encoder weights behind two sketches; 0 for equal weights."""
    host, base = ([float(value) for value in text.split()] for text in (ours, theirs))
    return math.dist(host, base) / math.hypot(*base)


def _encoder_weights(unet: Any) -> list[Tensor]:
    """In the order of their names, without LoRAs and without what an inpainting host reads beside the latents."""
    kind = host_kind(unet)
    named = {name.replace(".base_layer.", "."): weights for name, weights in unet.named_parameters()}
    named = {name: named[name] for name in named if name.split(".")[0] in kind.encoder and ".lora_" not in name}
    named[kind.entry_weight] = latent_part(named[kind.entry_weight], unet)
    return [named[name] for name in sorted(named)]

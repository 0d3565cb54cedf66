"""The embedded model's AutoencoderKL: 64 x 64 images to 4 x 16 x 16 latents.

It is purely convolutional, so it is trained on 32 x 32 crops around the sprites (the plain background
teaches nothing), in the art of all vendors, and works on whole images.
"""

import random
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from safepatch.tiny.loop import Schedule, fit
from safepatch.tiny.scenes import SIZE, draw, sample_scene, to_tensor
from safepatch.tiny.world import CONCEPTS

CROP, BATCH = 32, 16
SCHEDULE = Schedule(steps=3600, learning_rate=2e-3, decay=0.995)
KL_WEIGHT = 1e-4
VENDOR_WEIGHTS = {"noto": 0.5, "twemoji": 0.25, "fluent": 0.25}


def new_vae() -> AutoencoderKL:
    """An untrained autoencoder of the embedded model's structure."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
    )


def crops(rng: random.Random, n: int) -> Tensor:
    """`n` crops around sprites, float in [-1, 1], shape (n, 3, 32, 32)."""
    images = []
    for _ in range(n):
        scene = sample_scene(rng, rng.sample(list(CONCEPTS), rng.choice((1, 2))))
        item = rng.choice(scene.items)
        left, top = (_edge(rng, centre, item.size) for centre in (item.x, item.y))
        vendor = rng.choices(list(VENDOR_WEIGHTS), list(VENDOR_WEIGHTS.values()))[0]
        images.append(draw(scene, vendor).crop((left, top, left + CROP, top + CROP)))
    return to_tensor(images) * 2 - 1


def _edge(rng: random.Random, centre: float, size: int) -> int:
    reach = size / 2 - 8
    return min(SIZE - CROP, max(0, round(centre - CROP / 2 + rng.uniform(-reach, reach))))


def vae_loss(vae: Any, step: int) -> Tensor:
    """Absolute plus squared error of the reconstruction, with a light Kullback-Leibler term."""
    images = crops(random.Random(step), BATCH)
    posterior = vae.encode(images).latent_dist
    generator = torch.Generator().manual_seed(step)
    error = vae.decode(posterior.sample(generator)).sample - images
    return error.abs().mean() + error.square().mean() + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()


def psnr(vae: AutoencoderKL, vendor: str, n: int = 64) -> float:
    """Peak signal-to-noise ratio in dB over `n` whole scenes of one vendor."""
    rng = random.Random(10_000_019)
    names = list(CONCEPTS)
    images = to_tensor([draw(sample_scene(rng, rng.sample(names, rng.choice((1, 2)))), vendor) for _ in range(n)])
    with torch.no_grad():
        decoded = vae.decode(vae.encode(images * 2 - 1).latent_dist.mode()).sample
    return -10 * torch.log10((decoded.clamp(-1, 1) / 2 + 0.5 - images).square().mean()).item()


def train_vae(checkpoint: Path) -> AutoencoderKL:
    """Train (or finish training) the autoencoder and set its `scaling_factor` so that latents have unit variance."""
    torch.manual_seed(0)
    vae = fit(new_vae(), vae_loss, SCHEDULE, checkpoint)
    rng = random.Random(1)
    images = to_tensor([draw(sample_scene(rng, rng.sample(list(CONCEPTS), 2))) for _ in range(256)])
    with torch.no_grad():
        latents = vae.encode(images * 2 - 1).latent_dist.mode()
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    return vae

"""The embedded detector's network: which concepts does an image show?

It is trained on scenes as they come out of the autoencoder, clean and malformed (noised latents, half-denoised ones,
blur, pixel noise), in the art of every vendor. It never selects what a patch is trained on.
"""

import random
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, binary_cross_entropy_with_logits, interpolate
from tqdm import tqdm

from safepatch.tiny.loop import Schedule, fit
from safepatch.tiny.scenes import Scene, caption, draw, sample_scene, to_tensor
from safepatch.tiny.sprites import VENDORS
from safepatch.tiny.text import tokenize
from safepatch.tiny.world import CONCEPTS

POOL, BATCH = 9600, 64
SCHEDULE = Schedule(steps=2600, learning_rate=3e-3, decay=0.995, save_every=250)


class Classifier(nn.Module):
    """Images in [0, 1], (B, 3, 64, 64), to one logit per concept, (B, 76); a small convolutional network."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 96, 160)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
            layers += [nn.Conv2d(after, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(2 * widths[-1], len(CONCEPTS))

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape (B, 76)."""
        features = self.features(images * 2 - 1)
        return self.head(torch.cat((features.mean((2, 3)), features.amax((2, 3))), dim=1))


def labels(scenes: list[Scene]) -> Tensor:
    """One row per scene with 1 at each concept it shows, float, shape (N, 76)."""
    index = {name: i for i, name in enumerate(CONCEPTS)}
    truth = torch.zeros(len(scenes), len(CONCEPTS))
    for row, scene in zip(truth, scenes, strict=True):
        row[[index[name] for name in scene.concepts]] = 1
    return truth


def decoded_scenes(
    pipe: StableDiffusionPipeline, n: int, seed: int, noise: float = 0.0, half_denoised: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`n` random scenes as they come out of the autoencoder, uint8 (n, 3, 64, 64), and their labels.

    Args:
        pipe: the embedded base model.
        n: how many; empty backgrounds are one in thirty.
        seed: of scenes and noise.
        noise: largest standard deviation of the noise added to unit-variance latents.
        half_denoised: share of the chunks that are noised to a random timestep and cleaned in one step, which gives
            the smeared and misshapen objects that a diffusion model makes when it fails.
    """
    rng, generator = random.Random(f"classifier {seed}"), torch.Generator().manual_seed(seed)
    scenes, chunks = [_scene(rng) for _ in range(n)], []
    for start in tqdm(range(0, n, 64), desc="decoding scenes", mininterval=5):
        part = scenes[start : start + 64]
        images = to_tensor([draw(scene, rng.choice(list(VENDORS))) for scene in part])
        decoded = through_autoencoder(pipe, part, images, rng, generator, noise, half_denoised)
        chunks.append((decoded * 255).round().byte())
    return torch.cat(chunks), labels(scenes)


@torch.no_grad()
def through_autoencoder(
    pipe: StableDiffusionPipeline,
    scenes: list[Scene],
    images: Tensor,
    rng: random.Random,
    generator: torch.Generator,
    noise: float,
    half_denoised: float,
) -> Tensor:
    """Images of `scenes` as they come out of the autoencoder, half-denoised or with noise; shape kept."""
    latents = pipe.vae.encode(images * 2 - 1).latent_dist.mode() * pipe.vae.config.scaling_factor
    if rng.random() < half_denoised:
        latents = _half_denoise(pipe, scenes, latents, rng, generator)
    else:
        spread = torch.rand(len(latents), 1, 1, 1, generator=generator) * noise
        latents = latents + spread * torch.randn(latents.shape, generator=generator)
    return (pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)


def _half_denoise(
    pipe: StableDiffusionPipeline, scenes: list[Scene], latents: Tensor, rng: random.Random, generator: torch.Generator
) -> Tensor:
    """The base's one-step guess of clean latents from noised ones, x0 = sqrt(a) x_t - sqrt(1 - a) v; shape kept."""
    prompts = [caption(scene, rng) if scene.items else "" for scene in scenes]
    states = pipe.text_encoder(tokenize(pipe.tokenizer, prompts)).last_hidden_state
    timesteps = torch.randint(150, 600, (len(latents),), generator=generator)
    noisy = pipe.scheduler.add_noise(latents, torch.randn(latents.shape, generator=generator), timesteps)
    v_pred = pipe.unet(noisy, timesteps, states).sample
    a = pipe.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    return a.sqrt() * noisy - (1 - a).sqrt() * v_pred


def _scene(rng: random.Random) -> Scene:
    count = rng.choices((0, 1, 2), (1, 14, 15))[0]
    if count:
        return sample_scene(rng, rng.sample(list(CONCEPTS), count))
    return Scene((), rng.choice(["white", "blue", "green", "gray"]))


def roughen(images: Tensor, rng: random.Random, generator: torch.Generator) -> Tensor:
    """Blur, pixel noise, shift and contrast, as a diffusion model's mistakes might look; shape kept."""
    if rng.random() < 0.3:
        images = interpolate(avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
    if rng.random() < 0.4:
        images = images + rng.uniform(0, 0.08) * torch.randn(images.shape, generator=generator)
    images = torch.roll(images, (rng.randint(-3, 3), rng.randint(-3, 3)), (2, 3))
    return (0.5 + (images - 0.5) * rng.uniform(0.85, 1.15)).clamp(0, 1)


def train_classifier(pipe: StableDiffusionPipeline, checkpoint: Path) -> Classifier:
    """Train (or finish training) the classifier."""
    torch.manual_seed(0)
    images, truth = decoded_scenes(pipe, POOL, seed=1, noise=0.45, half_denoised=0.5)

    def loss(module: nn.Module, step: int) -> Tensor:
        rng, generator = random.Random(step), torch.Generator().manual_seed(step)
        picks = torch.randint(len(images), (BATCH,), generator=generator)
        batch = roughen(images[picks].float() / 255, rng, generator)
        return binary_cross_entropy_with_logits(module(batch), truth[picks]) * 10

    classifier = fit(Classifier().train(), loss, SCHEDULE, checkpoint)
    return _recalibrated(classifier, images)


def _recalibrated(classifier: Classifier, images: Tensor) -> Classifier:
    """Batch statistics of the averaged weights, measured on clean training images."""
    for module in classifier.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # cumulative
    classifier.train()
    with torch.no_grad():
        for chunk in images[:2048].split(128):
            classifier(chunk.float() / 255)
    return classifier.eval()

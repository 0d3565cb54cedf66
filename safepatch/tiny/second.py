"""The second detector's network: another architecture, seed and art than the first, so that their mistakes differ.

It reads a picture place by place (residual blocks with group normalisation, one logit per place and concept, pooled
by log-mean-exp), where the first one averages first. It learns the art of five vendors, each tile drawn anew in colour,
shape, outline and flatness; one more vendor is kept from both, to measure them by. Like the first it never selects what
a patch is trained on.
"""

import colorsys
import math
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, gelu
from tqdm import tqdm

from safepatch.tiny.classifier import labels, roughen, through_autoencoder
from safepatch.tiny.loop import Schedule, fit
from safepatch.tiny.scenes import SIZE, Item, Scene, sample_scene, to_tensor
from safepatch.tiny.sprites import MORE, VENDORS, sprites
from safepatch.tiny.world import COLORS, CONCEPTS

ART = (*VENDORS, *MORE)
POOL, BATCH = 16000, 48
SCHEDULE = Schedule(steps=4000, learning_rate=2e-3, decay=0.998, save_every=250)
SHARPNESS = 4.0  # of pooling: between the mean of all places and the strongest


class Block(nn.Module):
    """A residual block: (B, C, h, w) to (B, C', h / stride, w / stride)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride=stride, padding=1)
        self.second = nn.Conv2d(after, after, 3, padding=1)
        self.norms = nn.ModuleList([nn.GroupNorm(8, after), nn.GroupNorm(8, after)])
        self.across = nn.Conv2d(before, after, 1, stride=stride)

    def forward(self, hidden: Tensor) -> Tensor:
        """Two convolutions beside a way across."""
        made = gelu(self.norms[0](self.first(hidden)))
        return gelu(self.across(hidden) + self.norms[1](self.second(made)))


class SecondClassifier(nn.Module):
    """Images in [0, 1], (B, 3, 64, 64), to one logit per concept, (B, 76)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            Block(3, 32, 2), Block(32, 64, 2), Block(64, 128, 2), Block(128, 160, 1), Block(160, 192, 2)
        )
        self.head = nn.Conv2d(192, len(CONCEPTS), 1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape (B, 76)."""
        places = self.head(self.features(images * 2 - 1)).flatten(2)
        return (places * SHARPNESS).logsumexp(2).sub(math.log(places.shape[2])) / SHARPNESS


def restyled(tile: Image.Image, rng: random.Random) -> Image.Image:
    """A tile as another vendor might have drawn it: other colours, shape, outline and flatness; RGBA, same size."""
    if rng.random() < 0.5:
        tile = ImageOps.mirror(tile)
    tile = _recoloured(tile, rng)
    if rng.random() < 0.25:
        tile = _with_alpha(tile.convert("RGB").quantize(rng.randint(3, 8)).convert("RGB"), tile)
    if rng.random() < 0.3:
        tile = _outlined(tile, rng)
    edge = tile.width
    size = [max(8, round(edge * rng.uniform(0.7, 1.0))) for _ in range(2)]
    small = tile.resize((size[0], size[1]), Image.Resampling.BICUBIC).rotate(rng.uniform(-25, 25), expand=False)
    sheet = Image.new("RGBA", tile.size)
    sheet.paste(small, ((edge - size[0]) // 2, (edge - size[1]) // 2))
    return sheet


def _recoloured(tile: Image.Image, rng: random.Random) -> Image.Image:
    turn = rng.gauss(0, 0.03) if rng.random() < 0.8 else rng.uniform(-0.5, 0.5)
    turned = tile.convert("RGB")
    if abs(turn) > 0.005:
        r, g, b = (colorsys.hsv_to_rgb((turn + third) % 1, 1, 1) for third in (0, 1 / 3, 2 / 3))
        matrix = np.array([r, g, b]).T
        values = np.asarray(turned).astype(np.float32) @ matrix.T.astype(np.float32)
        turned = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    for change, low, high in (
        (ImageEnhance.Color, 0.3, 1.5),
        (ImageEnhance.Brightness, 0.75, 1.25),
        (ImageEnhance.Contrast, 0.75, 1.3),
    ):
        turned = change(turned).enhance(rng.uniform(low, high))
    return _with_alpha(turned, tile)


def _outlined(tile: Image.Image, rng: random.Random) -> Image.Image:
    """Dark lines around what is there, and along edges within."""
    alpha = tile.getchannel("A")
    edges = tile.convert("L").filter(ImageFilter.FIND_EDGES).point([0] * 61 + [255] * 195)
    around = alpha.filter(ImageFilter.MaxFilter(rng.choice((3, 5))))
    dark = Image.new("RGBA", tile.size, (rng.randint(0, 60),) * 3 + (255,))
    sheet = Image.new("RGBA", tile.size)
    sheet.paste(dark, mask=around)
    sheet.paste(Image.new("RGBA", tile.size, "white"), mask=alpha)
    sheet.paste(tile, mask=alpha)
    if rng.random() < 0.5:
        sheet.paste(dark, mask=Image.composite(edges, Image.new("L", tile.size), alpha))
    return sheet


def _with_alpha(colours: Image.Image, tile: Image.Image) -> Image.Image:
    made = colours.convert("RGBA")
    made.putalpha(tile.getchannel("A"))
    return made


def drawn(scene: Scene, vendor: str, rng: random.Random | None = None) -> Image.Image:
    """The scene in one vendor's art, each tile restyled if `rng` is given; 64 x 64 RGB."""
    colour = tuple(min(255, channel + scene.shade) for channel in COLORS[scene.color])
    image = Image.new("RGB", (SIZE, SIZE), colour)
    for item in scene.items:
        tile = sprites(vendor)[item.concept]
        _put(image, restyled(tile, rng) if rng else tile, item)
    return image


def _put(image: Image.Image, tile: Image.Image, item: Item) -> None:
    tile = tile.resize((item.size, item.size), Image.Resampling.BICUBIC)
    image.paste(tile, (round(item.x - item.size / 2), round(item.y - item.size / 2)), tile)


def scene_in(vendor: str, rng: random.Random) -> Scene:
    """A random scene of one or two concepts that the vendor has drawn, one in thirty with nothing."""
    count = rng.choices((0, 1, 2), (1, 14, 15))[0]
    if count:
        return sample_scene(rng, rng.sample(sorted(sprites(vendor)), count))
    return Scene((), rng.choice(list(COLORS)))


def styled_scenes(pipe: StableDiffusionPipeline, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """`n` random scenes in restyled art, half of them as the autoencoder and the model spoil them, and their labels.

    Returns:
        uint8 (n, 3, 64, 64), and float (n, 76).
    """
    rng, generator = random.Random(f"second {seed}"), torch.Generator().manual_seed(seed)
    scenes, chunks = list[Scene](), list[Tensor]()
    for start in tqdm(range(0, n, 64), desc="drawing scenes", mininterval=5):
        vendors = [rng.choice(ART) for _ in range(min(64, n - start))]
        part = [scene_in(vendor, rng) for vendor in vendors]
        images = to_tensor([drawn(scene, vendor, rng) for scene, vendor in zip(part, vendors, strict=True)])
        if rng.random() < 0.6:
            images = through_autoencoder(pipe, part, images, rng, generator, noise=0.45, half_denoised=0.5)
        scenes += part
        chunks.append((images * 255).round().byte())
    return torch.cat(chunks), labels(scenes)


def train_second(pipe: StableDiffusionPipeline, checkpoint: Path) -> SecondClassifier:
    """Train (or finish training) the second classifier."""
    torch.manual_seed(1)
    images, truth = styled_scenes(pipe, POOL, seed=2)

    def loss(module: nn.Module, step: int) -> Tensor:
        rng, generator = random.Random(f"second {step}"), torch.Generator().manual_seed(step + 1)
        picks = torch.randint(len(images), (BATCH,), generator=generator)
        batch = roughen(images[picks].float() / 255, rng, generator)
        return binary_cross_entropy_with_logits(module(batch), truth[picks]) * 10

    return fit(SecondClassifier().train(), loss, SCHEDULE, checkpoint).eval()


def hybrid(left: str, right: str, vendor: str) -> Tensor:
    """A picture that is one concept on its left and another on its right, (1, 3, 64, 64): what should a judge say?"""
    item = Item(left, 32, 32, 44)
    one, other = (drawn(Scene((Item(name, item.x, item.y, item.size),), "white"), vendor) for name in (left, right))
    one.paste(other.crop((32, 0, 64, 64)), (32, 0))
    return to_tensor([one])


def scenes_of(
    vendor: str, concepts: Sequence[str], n: int, seed: int, beside: Sequence[str] | None = None
) -> tuple[Tensor, Tensor]:
    """`n` scenes in a vendor's art as it is, each with one of `concepts`, half of them with another thing beside it.

    Args:
        vendor: whose art; concepts that it lacks are left out.
        concepts: to choose from.
        n: how many.
        seed: of the choice.
        beside: what else there may be; by default all others.

    Returns:
        Images (n, 3, 64, 64), and labels (n, 76).
    """
    rng = random.Random(f"{vendor} {seed}")
    known = [name for name in concepts if name in sprites(vendor)]
    others = [name for name in sorted(sprites(vendor)) if name in (beside or CONCEPTS) and name not in concepts]
    shown = [[rng.choice(known), *rng.sample(others or known, rng.randint(0, 1))] for _ in range(n)]
    scenes = [sample_scene(rng, rng.sample(names, len(names))) for names in shown]
    return to_tensor([drawn(scene, vendor) for scene in scenes]), labels(scenes)

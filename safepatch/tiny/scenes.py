"""Scenes: what an image shows, as a value; drawn as pixels and described by a caption.

A scene says everything there is to know about its image, so a counterfactual is exact: replace one
concept and draw again, and every other pixel's cause is the same.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from safepatch.tiny.sprites import sprites
from safepatch.tiny.world import COLORS, CONCEPTS, HELDOUT, KNOWN, Concept, Wording, phrase

SIZE = 64  # pixels


@dataclass(frozen=True)
class Item:
    """One sprite: its concept, centre and edge length in pixels."""

    concept: str
    x: float
    y: float
    size: int


@dataclass(frozen=True)
class Scene:
    """One or two items, left to right, on a plain background of a named colour."""

    items: tuple[Item, ...]
    color: str
    shade: int = 0  # added to the background's RGB, in [-6, 6]

    @property
    def concepts(self) -> tuple[str, ...]:
        """Names of the concepts shown, left to right."""
        return tuple(item.concept for item in self.items)

    def swap(self, old: str, new: str) -> "Scene":
        """The counterfactual: the same scene with concept `new` in the place of `old`."""
        return replace(self, items=tuple(replace(i, concept=new) if i.concept == old else i for i in self.items))


def sample_scene(rng: random.Random, concepts: Sequence[str]) -> Scene:
    """A random layout for one or two `concepts`, given left to right."""
    color, shade = rng.choice(list(COLORS)), rng.randint(-6, 6)
    if len(concepts) == 1:
        size = rng.randint(38, 46)
        items = (Item(concepts[0], 32 + rng.uniform(-5, 5), 32 + rng.uniform(-5, 5), size),)
    else:
        items = tuple(
            Item(concept, x + rng.uniform(-1.5, 1.5), 32 + rng.uniform(-6, 6), rng.randint(27, 30))
            for concept, x in zip(concepts, (16, 48), strict=True)
        )
    return Scene(items, color, shade)


def draw(scene: Scene, vendor: str = "noto") -> Image.Image:
    """The scene as a 64 x 64 RGB image in one vendor's art."""
    background = tuple(min(255, channel + scene.shade) for channel in COLORS[scene.color])
    image = Image.new("RGB", (SIZE, SIZE), background)
    for item in scene.items:
        tile = sprites(vendor)[item.concept].resize((item.size, item.size), Image.Resampling.BICUBIC)
        image.paste(tile, (round(item.x - item.size / 2), round(item.y - item.size / 2)), tile)
    return image


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """Images as float in [0, 1], shape (B, 3, H, W)."""
    stacked = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float().div(255)


def caption(scene: Scene, rng: random.Random, wording: Wording | None = None, names_from: Wording | None = None) -> str:
    """A caption of `scene`: a random template and a random name per concept.

    Args:
        scene: what to describe.
        rng: source of the choices.
        wording: the templates to choose from; None takes all of them (how the base model is taught).
        names_from: `KNOWN` for names patch training may use, `HELDOUT` for names it never sees; None follows `wording`.
    """
    names_from = names_from or wording
    nouns = [_noun(CONCEPTS[name], rng, names_from) for name in scene.concepts]
    wording = wording or rng.choice((KNOWN, HELDOUT))
    template = rng.choice(wording.one if len(nouns) == 1 else wording.two)
    return template.format(x=phrase(nouns[0]), y=phrase(nouns[-1]), c=scene.color)


def _noun(concept: Concept, rng: random.Random, names_from: Wording | None) -> str:
    if names_from is None:
        return rng.choice(concept.all_names)
    if names_from is KNOWN:
        return rng.choice(concept.known_names)
    return rng.choice(concept.heldout or concept.known_names)

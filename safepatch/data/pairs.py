"""Aligned counterfactual pairs and what must be preserved, as cached latents and text states.

A pair is one scene drawn twice, the second time with the unsafe sprite replaced by its safe one: same layout, same
background, same companion, a caption for each. Preserved beside them: benign prompts, look-alikes, the other
categories and the empty prompt, for all of which a patch must change nothing.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from tqdm import tqdm

from safepatch.diffusion import Components, encode_images, encode_prompts, generate_latents
from safepatch.errors import ConfigError
from safepatch.taxonomy import CATEGORIES, Category
from safepatch.tiny.scenes import Scene, caption, draw, sample_scene, to_tensor
from safepatch.tiny.world import BENIGN, KNOWN

# Shares of what is preserved. Other categories are there so that a patch does its own job only.
RETAIN_SHARES: dict[str, float] = {"benign": 0.35, "lookalike": 0.25, "other": 0.25, "empty": 0.15}


@dataclass(frozen=True)
class PairsConfig:
    """How many pairs to make.

    Attributes:
        pairs: aligned scenes, and as many preserved ones.
        companions: share of the pairs that show a benign object too.
        latents: `scenes` encodes the drawn scenes; `trajectories` lets the base model itself generate them, so that no
            image is needed.
        vendor: whose art to draw with.
        seed: of the scenes and captions.
    """

    pairs: int = 768
    companions: float = 0.65
    latents: str = "scenes"
    vendor: str = "noto"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be made."""
        if self.pairs < 1:
            raise ConfigError(f"data.pairs must be at least 1, not {self.pairs}")
        if not 0 <= self.companions <= 1:
            raise ConfigError(f"data.companions must be within [0, 1], not {self.companions}")
        if self.latents not in ("scenes", "trajectories"):
            raise ConfigError(f"data.latents must be 'scenes' or 'trajectories', not '{self.latents}'")


@dataclass(frozen=True)
class Example:
    """One prompt with the scene it describes; the empty prompt comes with any benign scene."""

    text: str
    scene: Scene


@dataclass(frozen=True)
class Batch:
    """Rows to learn from; latents are (B, 4, h, w) scaled, text states (B, tokens, width).

    Attributes:
        unsafe_latents, safe_latents: the two members of each pair.
        unsafe_states, safe_states: their captions' text states.
        retain_latents, retain_states: rows on which the base's prediction must stay.
    """

    unsafe_latents: Tensor
    safe_latents: Tensor
    unsafe_states: Tensor
    safe_states: Tensor
    retain_latents: Tensor
    retain_states: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same rows on `device`."""
        return Batch(*(getattr(self, field.name).to(device) for field in fields(self)))


@dataclass(frozen=True)
class PairBank:
    """Everything a patch is trained on, computed once: rows of a `Batch`, N of each."""

    rows: Batch

    def __len__(self) -> int:
        return len(self.rows.unsafe_latents)

    def batch(self, step: int, size: int, seed: int) -> Batch:
        """The batch of `size` pairs and `size` preserved rows that (step, seed) stands for."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        pairs = torch.randint(len(self), (size,), generator=generator)
        kept = torch.randint(len(self.rows.retain_latents), (size,), generator=generator)
        picks = {field.name: kept if field.name.startswith("retain") else pairs for field in fields(Batch)}
        return Batch(**{name: getattr(self.rows, name)[index] for name, index in picks.items()})


def pair_examples(category: Category, n: int, seed: int, companions: float = 0.65) -> list[tuple[Example, Example]]:
    """`n` aligned (unsafe, safe) examples, a share `companions` of them with a benign companion."""
    rng = random.Random(f"pairs {category.name} {seed}")
    return [_pair(category, i, rng, companions) for i in range(n)]


def _pair(category: Category, i: int, rng: random.Random, share: float) -> tuple[Example, Example]:
    concept = category.concepts[i % len(category.concepts)]
    companions = [c.name for c in BENIGN if c.name != concept.replacement]
    names = [concept.name, rng.choice(companions)] if rng.random() < share else [concept.name]
    rng.shuffle(names)
    scene = sample_scene(rng, names)
    safe = scene.swap(concept.name, concept.replacement)
    same_template = rng.random()  # both captions draw their choices from equal generators, so wording is aligned too
    first, second = (caption(s, random.Random(same_template), KNOWN) for s in (scene, safe))
    return Example(first, scene), Example(second, safe)


def retain_examples(category: Category, n: int, seed: int) -> list[Example]:
    """`n` examples that must stay as they are, mixed by `RETAIN_SHARES`."""
    rng = random.Random(f"retain {category.name} {seed}")
    kinds = rng.choices(list(RETAIN_SHARES), list(RETAIN_SHARES.values()), k=n)
    return [_retained(kind, category, rng) for kind in kinds]


def _retained(kind: str, category: Category, rng: random.Random) -> Example:
    others = [c.name for other in CATEGORIES.values() if other.name != category.name for c in other.concepts]
    benign = [c.name for c in BENIGN]
    first = {"benign": benign, "lookalike": category.lookalikes, "other": others, "empty": benign}[kind]
    name = rng.choice(list(first))
    names = [name, rng.choice([b for b in benign if b != name])] if rng.random() < 0.5 else [name]
    rng.shuffle(names)
    scene = sample_scene(rng, names)
    return Example("" if kind == "empty" else caption(scene, rng, KNOWN), scene)


def build_bank(components: Components, category: Category, config: PairsConfig) -> PairBank:
    """Draw, encode and cache all examples of `config` with the host's own autoencoder and text encoder."""
    pairs = pair_examples(category, config.pairs, config.seed, config.companions)
    groups = ([unsafe for unsafe, _ in pairs], [safe for _, safe in pairs])
    groups = (*groups, retain_examples(category, config.pairs, config.seed))
    latents = [_latents(components, group, config) for group in groups]
    states = [_states(components, [example.text for example in group]) for group in groups]
    return PairBank(Batch(latents[0], latents[1], states[0], states[1], latents[2], states[2]))


def _latents(components: Components, examples: Sequence[Example], config: PairsConfig) -> Tensor:
    if config.latents == "scenes":
        return _scene_latents(components, examples, config.vendor)
    chunks = []  # the members of a pair start from the same noise: example i of either group has seed i
    for start in tqdm(range(0, len(examples), 32), desc="generating latents", leave=False):
        prompts = [example.text for example in examples[start : start + 32]]
        seeds = [config.seed * 1_000_003 + start + i for i in range(len(prompts))]
        chunks.append(generate_latents(components, prompts, seeds))
    return torch.cat(chunks)


def _scene_latents(components: Components, examples: Sequence[Example], vendor: str) -> Tensor:
    chunks = []
    for start in tqdm(range(0, len(examples), 64), desc="encoding scenes", leave=False):
        images = to_tensor([draw(example.scene, vendor) for example in examples[start : start + 64]])
        chunks.append(encode_images(components.vae, images))
    return torch.cat(chunks)


def _states(components: Components, prompts: Sequence[str]) -> Tensor:
    starts = range(0, len(prompts), 128)
    return torch.cat([encode_prompts(components, prompts[start : start + 128]) for start in starts])

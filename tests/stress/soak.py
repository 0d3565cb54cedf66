"""Threads that draw with one patched UNet, for as long as one likes: `python tests/stress/soak.py [--images 500]`.

Prompts that open a gate and prompts that do not are mixed; every image must be, bit for bit, the one that a single
thread draws. Small random models: it shows that the mechanism holds under load, not that a patch is any good.
"""

import argparse
import itertools
import json
import random
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))  # as a script it finds `tests`

from safepatch.artifact.info import BUNDLE
from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.diffusion import Components, quiet
from safepatch.merging import MergeRecipe, combine
from safepatch.patch import PATCH_KINDS
from safepatch.patch.files import to_artifact
from safepatch.patch.text import TextPatch
from safepatch.progress import bar
from safepatch.runtime.apply import apply
from tests.small import INSTRUCTION, awaken, new_patch, new_small_pipe

PROMPTS = ["a knife", "a dog", "a knife next to a cat", "a picture of a tree", "a sword", "a cup", "a car", "a bird"]


@dataclass(frozen=True)
class Found:
    """What a soak found.

    Attributes:
        drawn: images drawn by threads.
        right: those that equal a single thread's.
        changed: those that differ from the base's.
    """

    drawn: int
    right: int
    changed: int


def sharing(pipe: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """A thread's own pipeline: the same networks, but a scheduler and a tokenizer of its own.

    Both hold one call's state, a tokenizer its padding and truncation: shared, unpatched images differ too.
    """
    own = {"scheduler": type(pipe.scheduler).from_config(pipe.scheduler.config), "tokenizer": deepcopy(pipe.tokenizer)}
    parts = {**pipe.components, **own}
    return quiet(StableDiffusionPipeline(**parts, requires_safety_checker=False))


def drawn_by(pipe: StableDiffusionPipeline, prompt: str, steps: int = 2, step: Callable | None = None) -> Tensor:
    """One image, (3, 64, 64), guided, in the thread that asks."""
    generator = torch.Generator().manual_seed(1)
    options: dict[str, Any] = {"callback_on_step_end": step} if step else {}
    call = {"num_inference_steps": steps, "guidance_scale": 4.0, "height": 64, "width": 64, "output_type": "pt"}
    with torch.no_grad():
        return pipe(prompt, generator=generator, **call, **options).images[0]


def gated_artifact(pipe: StableDiffusionPipeline, kind: str, seed: int = 0, share: float = 0.5) -> PatchArtifact:
    """An awake patch whose gate opens for about a `share` of `PROMPTS`."""
    patch = new_patch(pipe.unet, kind, seed=None)
    patch.add_gate(pipe.unet, 4)
    return _opening(pipe, to_artifact(awaken(patch, seed), pipe.unet, {"weapons": INSTRUCTION}), share)


def gated_text_artifact(pipe: StableDiffusionPipeline, seed: int = 0, share: float = 0.5) -> PatchArtifact:
    """Likewise, of the text encoder."""
    components = Components.of(pipe)
    patch = awaken(TextPatch.of(components, "text_encoder", rank=4, gate=4), seed)
    return _opening(pipe, to_artifact(patch, components, {"weapons": INSTRUCTION}), share)


def _opening(pipe: StableDiffusionPipeline, artifact: PatchArtifact, share: float) -> PatchArtifact:
    config = {**artifact.info.config, "gate": {"weapons": {"threshold": _between(pipe, artifact, share)}}}
    return replace(artifact, info=replace(artifact.info, config=config))


def _between(pipe: StableDiffusionPipeline, artifact: PatchArtifact, share: float) -> float:
    """Above what the gate makes of the others."""
    config = {**artifact.info.config, "gate": {"weapons": {"threshold": 0.5}}}
    seen: list[list[float]] = []
    weak = 1e-6  # so that later steps are judged as the base makes them
    with apply(pipe, replace(artifact, info=replace(artifact.info, config=config)), weak) as handle:
        handle.on_gate = lambda _, probabilities: seen[-1].append(float(probabilities.max()))
        for prompt in PROMPTS:
            seen.append([])
            drawn_by(pipe, prompt)
    return float(torch.quantile(torch.tensor([max(steps) for steps in seen]), 1 - share))


def bundle_of(pipe: StableDiffusionPipeline) -> PatchArtifact:
    """All kinds in one file, and a text encoder's patch, each with a gate."""
    parts = [gated_artifact(pipe, kind, seed, share=0.25) for seed, kind in enumerate(sorted(PATCH_KINDS))]
    parts.append(gated_text_artifact(pipe, share=0.25))
    names = ("weapons", "gore", "drugs", "horror")
    renamed = [_for(part, name) for part, name in zip(parts, names, strict=True)]
    return combine(renamed, MergeRecipe(names, (1.0,) * len(names), BUNDLE))


def _for(artifact: PatchArtifact, name: str) -> PatchArtifact:
    config = {**artifact.info.config, "gate": {name: artifact.info.config["gate"]["weapons"]}}
    return replace(artifact, info=replace(artifact.info, config=config, instructions={name: INSTRUCTION}))


def soak(images: int, threads: int = 4, seed: int = 0) -> Found:
    """Draw `images` with a bundle of all kinds in threads, in a random order of prompts, gates hard, soft and off."""
    pipe = new_small_pipe()
    base = {prompt: drawn_by(pipe, prompt) for prompt in PROMPTS}
    rng, pipes, found = random.Random(seed), [sharing(pipe) for _ in range(threads)], Found(0, 0, 0)
    rounds = {"hard": images - 2 * (images // 4), "soft": images // 4, "off": images // 4}
    bundle = bundle_of(pipe)
    with bar(total=images, desc="drawing", unit="image") as shown:
        for gate, number in rounds.items():
            with apply(pipe, bundle, gate=gate):
                alone = {prompt: drawn_by(pipe, prompt) for prompt in PROMPTS}
                shares = [[rng.choice(PROMPTS) for _ in range(number)][i::threads] for i in range(threads)]
                with ThreadPoolExecutor(threads) as pool:
                    drawn = pool.map(lambda own, prompts: [(p, drawn_by(own, p)) for p in prompts], pipes, shares)
                    for prompt, image in itertools.chain.from_iterable(drawn):
                        right, same = torch.equal(image, alone[prompt]), torch.equal(image, base[prompt])
                        found = Found(found.drawn + 1, found.right + right, found.changed + (not same))
                        shown.update()
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--threads", type=int, default=4)
    options = parser.parse_args()
    result = soak(options.images, options.threads)
    print(json.dumps(asdict(result)))
    sys.exit(0 if result.right == result.drawn == options.images and 0 < result.changed < result.drawn else 1)

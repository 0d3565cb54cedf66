"""Draw the README's pictures from the shipped patches: `python patches/pictures.py`."""

from typing import Any

import torch

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.data.prompts import Prompt, benign_prompts, lookalike_prompts, unsafe_prompts
from safepatch.diffusion import generate, quiet
from safepatch.models.load import load_pipeline
from safepatch.reporting.plots import GateCurve, save_gate_plot
from safepatch.runtime.apply import apply
from safepatch.shipped import PATCHES, shipped_patch, shipped_patches
from safepatch.taxonomy import CATEGORIES
from safepatch.training.validation import save_grid

SEED = 1000  # of the pictures' prompts: the evaluation's own


def write_picture() -> None:
    """`patches/picture.png`: base above, patched below; per category two unsafe prompts, a look-alike, a benign one."""
    pipe, columns = quiet(load_pipeline("tiny-sd")), []
    for name, category in CATEGORIES.items():
        prompts = [*unsafe_prompts(category, 6, SEED)[:6:5], *lookalike_prompts(category, 1, SEED)]
        prompts += benign_prompts(1, SEED + len(columns))
        texts, seeds = [prompt.text for prompt in prompts], [prompt.seed for prompt in prompts]
        base = generate(pipe, texts, seeds)
        with apply(pipe, shipped_patch(name, "control")):
            columns.append(torch.stack((base, generate(pipe, texts, seeds))))
    save_grid(torch.cat(columns, dim=1), PATCHES / "picture.png")


def write_gates() -> None:
    """`patches/gates.png`: each lite patch's gate, step by step, on an unsafe, a look-alike and a benign prompt."""
    pipe, curves, thresholds = quiet(load_pipeline("tiny-sd")), {}, {}
    for name, entry in shipped_patches("lite").items():
        patch, category = PatchArtifact.open(entry.path), CATEGORIES[name]
        shown = [*unsafe_prompts(category, 1, SEED), *lookalike_prompts(category, 1, SEED), *benign_prompts(1, SEED)]
        curves[name] = [GateCurve(prompt.text, _judged(pipe, patch, prompt)) for prompt in shown]
        thresholds[name] = patch.info.config["gate"][name]["threshold"]
    save_gate_plot(PATCHES / "gates.png", curves, thresholds)


def _judged(pipe: Any, patch: PatchArtifact, prompt: Prompt) -> list[float]:
    """The gate's probability at every step of one image."""
    seen: list[float] = []
    with apply(pipe, patch) as handle:
        handle.on_gate = lambda _, probabilities: seen.append(float(probabilities[0, 0]))
        generate(pipe, [prompt.text], [prompt.seed])
    return seen


if __name__ == "__main__":
    write_picture()
    write_gates()

"""Draw the README's pictures from the shipped patches: `python patches/pictures.py`."""

from typing import Any

import torch

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.data.corpus import Corpus
from safepatch.data.prompts import Prompt
from safepatch.diffusion import generate, quiet
from safepatch.models.load import load_pipeline
from safepatch.reporting.plots import GateCurve, save_gate_plot
from safepatch.runtime.apply import apply
from safepatch.shipped import PATCHES, shipped_patch, shipped_patches
from safepatch.training.validation import save_grid

SEED = 1000  # of the pictures' prompts: the evaluation's own


def write_picture() -> None:
    """`patches/picture.png`: base above, patched below; per category two unsafe prompts, a look-alike, a benign one."""
    pipe, columns = quiet(load_pipeline("tiny-sd")), []
    for name in shipped_patches("control"):
        corpus = Corpus.open(name)
        prompts = [*corpus.evaluation("plain", 6, SEED)[:6:5], *corpus.evaluation("lookalike", 1, SEED)]
        prompts += corpus.evaluation("benign", 1, SEED + len(columns))
        texts, seeds = [prompt.text for prompt in prompts], [prompt.seed for prompt in prompts]
        base = generate(pipe, texts, seeds)
        with apply(pipe, shipped_patch(name, "control")):
            columns.append(torch.stack((base, generate(pipe, texts, seeds))))
    save_grid(torch.cat(columns, dim=1), PATCHES / "picture.png")


def write_gates() -> None:
    """`patches/gates.png`: each lite patch's gate, step by step, on an unsafe, a look-alike and a benign prompt."""
    pipe, curves, thresholds = quiet(load_pipeline("tiny-sd")), {}, {}
    for name, entry in shipped_patches("lite").items():
        patch, corpus = PatchArtifact.open(entry.path), Corpus.open(name)
        shown = [corpus.evaluation(kind, 1, SEED)[0] for kind in ("plain", "lookalike", "benign")]
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

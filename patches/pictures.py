"""Draw the README's pictures from the shipped patches: `python patches/pictures.py`."""

import torch

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.data.corpus import Corpus
from safepatch.diffusion import Components, Spelling, encode_prompts, encode_windows, generate, quiet, windows
from safepatch.models.load import load_pipeline
from safepatch.patch.files import from_artifact
from safepatch.reporting.plots import save_gate_plot
from safepatch.runtime.apply import apply
from safepatch.shipped import PATCHES, shipped_patch, shipped_patches
from safepatch.training.validation import save_grid

SEED = 1000  # of the pictures' prompts: the evaluation's own
GATED = ("a knife", "trombone oven trumpet a knife", "a dog next to a cake")


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


@torch.no_grad()
def write_gates() -> None:
    """`patches/gates.png`: what the gate for weapons makes of prompts, and of any three words in a row."""
    pipe = quiet(load_pipeline("tiny-sd"))
    components, artifact = Components.of(pipe), PatchArtifact.open(shipped_patch("weapons", "lora"))
    record, gate = artifact.info.config["gate"]["weapons"], from_artifact(artifact, components.unet).gate
    assert gate is not None
    heard, spelling = dict[str, dict[str, float]](), Spelling(pipe.tokenizer)
    for prompt in GATED:
        found = windows(spelling.words(pipe.tokenizer(prompt).input_ids), record["windows"])
        states = [encode_prompts(components, [prompt]), *(encode_windows(components, [window]) for window in found)]
        texts = ["(all of it)", *(pipe.tokenizer.decode([t for word in window for t in word]) for window in found)]
        read = [float(gate.read(each).sigmoid()) for each in states]
        heard[prompt] = dict(zip(texts, read, strict=True))
    save_gate_plot(PATCHES / "gates.png", heard, record["threshold"])


if __name__ == "__main__":
    write_picture()
    write_gates()

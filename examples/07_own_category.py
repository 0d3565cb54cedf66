"""A category of one's own from two files, YAML and CSV, then a patch for it; harmless stand-ins, three steps."""

import tempfile
from pathlib import Path

import torch

import safepatch
from safepatch.diffusion import generate, quiet

CATEGORY = """\
name: fast-food
definition: food that is quick to buy and quick to eat
instruction: "no fast food, show vegetables and fruit instead"
pairs: fast-food.csv
lookalikes: [a carrot, a watermelon]
"""
PAIRS = "prompt,safe\na pizza,a carrot\na donut on a blue background,a watermelon on a blue background\n"

pipe, texts = quiet(safepatch.load_pipeline("tiny-sd")), ["a pizza on a white background"]
with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    (folder / "fast-food.yaml").write_text(CATEGORY)
    (folder / "fast-food.csv").write_text(PAIRS)
    corpus = safepatch.Corpus.open(folder / "fast-food.yaml")
    print(*corpus.notes, sep="\n")  # what was read, and which column was taken for what
    quick = ["training.steps=3", "data.pairs=8", "data.steps=2", "patch.gate=0"]  # real runs: hundreds, and a gate
    config = safepatch.load_train_config(None, [f"output={folder}/run", f"data.cache={folder}/cache", *quick])
    path = safepatch.train(pipe, config, corpus)
    base = generate(pipe, texts, [3], steps=4)
    with safepatch.apply(pipe, path):
        patched = generate(pipe, texts, [3], steps=4)

assert not torch.equal(base, patched)
assert torch.equal(base, generate(pipe, texts, [3], steps=4))

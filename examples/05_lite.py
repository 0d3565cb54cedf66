"""Two lite patches as one file: exact, a scale for each category, and harmless images untouched to the last bit."""

from pathlib import Path

import torch

import safepatch
from safepatch.diffusion import generate, quiet

Path("runs").mkdir(exist_ok=True)
sources = ["patches/lite/weapons.safetensors", "patches/lite/alcohol.safetensors"]
both = safepatch.merge(sources, "runs/both-lite.safetensors", method="cat")
print(f"{', '.join(both.info.categories)}: {Path('runs/both-lite.safetensors').stat().st_size / 1e6:.1f} MB")

pipe = quiet(safepatch.load_pipeline("tiny-sd"))
prompts, seeds = ["a knife on a blue background", "a cat next to a robot"], [3, 4]
base = generate(pipe, prompts, seeds)
with safepatch.apply(pipe, "runs/both-lite.safetensors", scale={"weapons": 1.0, "alcohol": 0.5}) as handle:
    patched = generate(pipe, prompts, seeds)
    print(f"the gate opened for {handle.stats.open_rows} of {handle.stats.gated_rows} rows")

same = [torch.equal(before, after) for before, after in zip(base, patched, strict=True)]
assert same == [False, True]

"""A lora patch in a program that knows nothing of safepatch, here diffusers with PEFT, and back again."""

import tempfile
from pathlib import Path

import torch

import safepatch
from safepatch.diffusion import generate, quiet
from safepatch.export import export, import_lora

PATCH, TEXTS = "patches/lora/weapons.safetensors", ["a knife on a blue background"]

pipe = quiet(safepatch.load_pipeline("tiny-sd"))
with tempfile.TemporaryDirectory() as name:
    lora = export(PATCH, Path(name) / "weapons.safetensors")  # kohya's names: ComfyUI, A1111, Forge, diffusers
    base = generate(pipe, TEXTS, [3], steps=6, guidance_scale=1.0)
    with safepatch.apply(pipe, PATCH, gate="off"):
        patched = generate(pipe, TEXTS, [3], steps=6, guidance_scale=1.0)
    pipe.load_lora_weights(name, weight_name=lora.name)  # there it is always on, without a gate
    elsewhere = generate(pipe, TEXTS, [3], steps=6, guidance_scale=1.0)
    again = import_lora(lora)  # here it is the gated patch that it was
    print(again.info.categories, again.info.config["gate"]["weapons"]["threshold"])

assert not torch.equal(base, patched)
assert torch.allclose(patched, elsewhere, atol=0.02)
assert again.content_hash == safepatch.PatchArtifact.open(PATCH).content_hash

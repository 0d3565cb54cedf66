"""Merge two patches into one file and load it like any other; no diffusers needed for the merge itself."""

import tempfile
from pathlib import Path

import safepatch

sources = ["patches/weapons/weapons.safetensors", "patches/alcohol/alcohol.safetensors"]
with tempfile.TemporaryDirectory() as folder:
    out = Path(folder) / "both.safetensors"
    merged = safepatch.merge(sources, out, method="linear")
    info = safepatch.verify(out)

print(info.recipe)
assert info.categories == merged.info.categories == ("alcohol", "weapons")

"""Merge two patches into one file and load it like any other; no diffusers needed for the merge itself."""

import tempfile
from pathlib import Path

import safepatch

sources = ["patches/control/weapons.safetensors", "patches/control/alcohol.safetensors"]
with tempfile.TemporaryDirectory() as folder:
    out = Path(folder) / "both.safetensors"
    merged = safepatch.merge(sources, out, method="linear")
    info = safepatch.verify(out)

print(info.recipe)
assert info.categories == merged.info.categories == ("alcohol", "weapons")

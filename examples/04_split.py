"""Merge exactly, see where the patches disagree, and take one of them out of the file again, byte for byte."""

import tempfile
from pathlib import Path

import safepatch

weapons, alcohol = (Path(f"patches/control/{name}.safetensors") for name in ("weapons", "alcohol"))
with tempfile.TemporaryDirectory() as folder:
    both, part = Path(folder) / "both.safetensors", Path(folder) / "weapons.safetensors"
    recipe = safepatch.MergeRecipe((str(weapons), str(alcohol)), weights=(1.0, 0.8), method="bundle")
    info = safepatch.merge(recipe, both).info
    print((info.recipe or {})["conflicts"][0]["overall"])
    safepatch.split(both, "weapons", part)
    came_back = part.read_bytes() == weapons.read_bytes()

assert came_back

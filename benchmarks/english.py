"""How often gates open, by the text alone, for harmless English that none of them learned from.

    python benchmarks/english.py [PATCH ...]          the shipped patches of every kind by default

The phrases are look-alikes, replacements and companions named in the shipped categories for real models, less what
stands in the shipped vocabulary of common things; each is read alone and as "a picture of ...". The embedded text
encoder spells most of these words letter by letter, so its figures say little of CLIP's.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.attacks import text_logits
from safepatch.data.category import read_category, shipped_categories
from safepatch.data.corpus import common_words
from safepatch.diffusion import Components, UNetHost
from safepatch.models.load import load_pipeline
from safepatch.patch.files import from_artifact
from safepatch.patch.gate import TextGate
from safepatch.shipped import shipped_kinds, shipped_patches

OUT = Path("runs/english.json")


def harmless_phrases() -> list[str]:
    """Harmless things of the categories for real models that no gate learned from."""
    learned = {name for thing in common_words().benign for name in thing}
    named: dict[str, None] = {}
    for name, path in shipped_categories().items():
        file = read_category(path)
        if name.startswith(("i2p-", "ud-")):
            named |= dict.fromkeys((*file.lookalikes, *(concept.replacement for concept in file.concepts)))
    return [phrase for phrase in named if phrase not in learned]


def opened(host: UNetHost, path: Path, texts: Sequence[str], reads: str = "windows") -> tuple[str, Tensor]:
    """The category of a patch, and for which of the texts its gate opens, (N,) bool; see `Handle.reads`."""
    artifact = PatchArtifact.open(path)
    name = artifact.info.categories[0]
    gate = cast(TextGate, from_artifact(artifact, host.unet).gate)
    record = artifact.info.config["gate"][name]
    windows = record.get("windows", 0) if reads == "windows" else 0
    return name, text_logits(host, gate, texts, windows).sigmoid() >= record["threshold"]


def main(patches: Mapping[str, list[Path]]) -> None:
    """Measure, print, keep; the patches by kind."""
    host = UNetHost(Components.of(load_pipeline("tiny-sd")))
    phrases = harmless_phrases()
    texts, found = [*phrases, *(f"a picture of {phrase}" for phrase in phrases)], {}
    for kind, paths in patches.items():
        opens = dict(opened(host, path, texts) for path in paths)
        opens["any"] = torch.stack([*opens.values()]).any(0)
        whole = [opened(host, path, texts, "prompt")[1] for path in paths]
        opens["any, read whole"] = torch.stack(whole).any(0)
        found[kind] = {"texts": len(texts)} | {name: float(each.float().mean()) for name, each in opens.items()}
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(found, indent=1) + "\n")
    for kind, shares in found.items():
        print(f"{kind}: " + ", ".join(f"{name} {share:.3f}" for name, share in shares.items()))


if __name__ == "__main__":
    given = [Path(word) for word in sys.argv[1:]]
    main({"given": given} if given else {k: [e.path for e in shipped_patches(k).values()] for k in shipped_kinds()})

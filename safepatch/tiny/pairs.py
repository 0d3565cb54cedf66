"""Drawn scenes as a folder of picture pairs: `python -m safepatch.tiny.pairs weapons FOLDER [N] [VENDOR]`.

A pair is one scene drawn twice, the second time with the unsafe sprite replaced by its safe one: same layout, same
background, same companion, a caption for each. `FOLDER/weapons.csv` names prompts and pictures; as `pairs:` of a
category file it takes the place of pictures that the model draws itself.
"""

import csv
import random
import sys
from pathlib import Path

from safepatch.errors import lookup
from safepatch.tiny.scenes import Scene, caption, draw, sample_scene
from safepatch.tiny.world import BENIGN, KNOWN, UNSAFE_BY_KIND

COLUMNS = ("prompt", "safe", "image", "safe_image")
COMPANIONS = 0.65  # share of the scenes that show a benign thing too


def write_pairs(kind: str, folder: Path, n: int = 768, vendor: str = "noto", seed: int = 0) -> Path:
    """Draw `n` pairs of one of the world's kinds of unsafe things into `folder`; returns the path of the table."""
    concepts, rng = lookup(UNSAFE_BY_KIND, kind, what="kind"), random.Random(f"pairs {kind} {seed}")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{kind}.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for i in range(n):
            concept = concepts[i % len(concepts)]
            scene = _scene(concept.name, concept.replacement, rng)
            members = (scene, scene.swap(concept.name, concept.replacement))
            same = rng.random()  # both captions draw their choices from equal generators, so wording is aligned too
            names = [f"{kind}-{i:04d}-{member}.png" for member in ("unsafe", "safe")]
            for member, name in zip(members, names, strict=True):
                draw(member, vendor).save(folder / name)
            table.writerow([*(caption(member, random.Random(same), KNOWN) for member in members), *names])
    return path


def _scene(name: str, replacement: str, rng: random.Random) -> Scene:
    others = [concept.name for concept in BENIGN if concept.name != replacement]
    names = [name, rng.choice(others)] if rng.random() < COMPANIONS else [name]
    rng.shuffle(names)
    return sample_scene(rng, names)


if __name__ == "__main__":
    kind, place, n, vendor = (*sys.argv[1:], *("768", "noto")[len(sys.argv) - 3 :])
    print(write_pairs(kind, Path(place), int(n), vendor))  # noqa: T201 -- a script's answer

"""Where the safe twin comes from: one category trained with each of the five rewrites, by the same recipe.

    python benchmarks/rewrite.py --category weapons --steps 400 --pairs 384 --n 100

Drawn scenes (`--scenes`) are a sixth line: pictures of `safepatch.tiny.pairs` in place of those the model draws itself.
Writes `runs/rewrite.json` and prints it as a table. All of it is on the embedded model.
"""

import argparse
import csv
import json
import tempfile
import time
from pathlib import Path

import yaml

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.data.category import category_path
from safepatch.data.corpus import Corpus
from safepatch.detectors.embedded import embedded_detector
from safepatch.evaluation.bench import Bench, Protocol
from safepatch.evaluation.suite import MEASURES
from safepatch.models.load import load_pipeline
from safepatch.tiny.pairs import write_pairs
from safepatch.training.config import load_train_config
from safepatch.training.trainer import train

MODEL = "tiny-sd"
FIELDS = ("unsafe_rate", "unsafe_rate_heldout", "safe_recognisable_rate", "companion_kept", "benign_drift")
REWRITES = {
    "replace": {"by": "replace"},
    "column": {"by": "column"},
    "target": {"by": "target", "target": "a picture of a tree"},
    "empty": {"by": "empty"},
    "guided": {"by": "guided", "scale": 1.0},
}


def category_file(name: str, rewrite: dict, folder: Path, scenes: Path | None = None) -> Path:
    """The shipped category with another rewrite; `column` has its captions, and their twins, in a table."""
    content = yaml.safe_load(category_path(name).read_text())
    content["rewrite"] = rewrite
    if rewrite["by"] == "column":
        content["pairs"] = str(scenes) if scenes else str(_table(name, folder))
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def _table(name: str, folder: Path) -> Path:
    path = folder / f"{name}.csv"
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("prompt", "safe"))
        table.writerows((pair.unsafe.text, pair.safe.text) for pair in Corpus.open(name).pairs(384, 1))
    return path


def measured(name: str, line: str, args: argparse.Namespace) -> dict[str, float]:
    """Train one patch and measure it on the shipped category's prompts; also the minutes that training took."""
    start, scenes = time.monotonic(), None
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if line == "scenes":
            scenes = write_pairs(name, folder / "scenes", args.pairs)
        path = category_file(name, REWRITES.get(line, {"by": "column"}), folder, scenes)
        settings = {"training.steps": args.steps, "training.learning_rate": 1e-3, "data.pairs": args.pairs}
        settings |= {"model": MODEL, "patch.kind": args.kind, "data.steps": 8, "output": folder / "out"}
        config = load_train_config(path, [f"{key}={value}" for key, value in settings.items()])
        patch = PatchArtifact.open(train(config.load_model(), config))
    minutes = (time.monotonic() - start) / 60
    bench = Bench(MODEL, load_pipeline(MODEL), embedded_detector(), Protocol(n=args.n, steps=10, guidance_scale=1.5))
    corpus = Corpus.open(name)
    found = {field: MEASURES[field].run(bench, corpus, patch) for field in FIELDS}
    return {field: estimate.value for field, estimate in found.items() if estimate} | {"minutes": minutes}


def main() -> None:
    """Train, measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--category", default="weapons")
    parser.add_argument("--kind", default="lora")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--pairs", type=int, default=384)
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--only", nargs="*", default=[*REWRITES, "scenes"])
    parser.add_argument("--out", type=Path, default=Path("runs/rewrite.json"))
    args = parser.parse_args()
    kept = json.loads(args.out.read_text()) if args.out.is_file() else {}
    print("| rewrite | " + " | ".join((*FIELDS, "minutes")) + " |\n|" + "---|" * (len(FIELDS) + 2))
    for line in args.only:
        kept[line] = measured(args.category, line, args)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(kept, indent=1) + "\n")
        cells = [f"{kept[line][field]:.3f}" if field in kept[line] else "" for field in (*FIELDS, "minutes")]
        print(f"| {line} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

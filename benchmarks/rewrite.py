"""Where the safe twin comes from: one category trained with each of the five rewrites, by the same recipe.

    python benchmarks/rewrite.py --category weapons --steps 400 --pairs 384 --n 100

Drawn scenes (`--scenes`) are a sixth line: pictures of `safepatch.tiny.pairs` in place of those the model draws itself.
Writes `runs/rewrite.json` and prints it as a table. All of it is on the embedded model.

    python benchmarks/rewrite.py --teacher 0 0.5 1 2 4 8

draws with the teacher of `guided` itself at these scales, without any training: what a patch could learn at best. A
prompt is pushed from itself towards itself with "something" in the concept's place; then, as one that names no concept
is, from all the category's names towards the empty prompt.
"""

import argparse
import csv
import json
import tempfile
import time
from itertools import product
from pathlib import Path

import yaml

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.data.category import Rewrite, category_path
from safepatch.data.corpus import Corpus
from safepatch.data.guided import guided
from safepatch.data.prompts import Pair, Prompt
from safepatch.data.twins import without
from safepatch.detectors.embedded import embedded_detector
from safepatch.diffusion import Components, UNetHost, batched, decode_latents
from safepatch.evaluation.bench import Bench, Protocol
from safepatch.evaluation.suite import MEASURES
from safepatch.models.load import load_pipeline
from safepatch.tiny.pairs import write_pairs
from safepatch.training.config import load_train_config
from safepatch.training.trainer import train

MODEL = "tiny-sd"
FIELDS = ("unsafe_rate", "unsafe_rate_heldout", "safe_recognisable_rate", "companion_kept", "benign_drift")
TEACHER_FIELDS = ("unsafe_rate", "safe_recognisable_rate", "companion_kept")
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


def teacher(name: str, rewrite: Rewrite, is_named: bool, n: int) -> dict[str, float]:
    """Rates of the pictures that the teacher of `guided` draws of the prompts that evaluation asks for."""
    pipe, detector, opened = load_pipeline(MODEL), embedded_detector(), Corpus.open(name)
    host, corpus = UNetHost(Components.of(pipe)), Corpus(opened.category, words=opened.words, rewrite=rewrite)
    prompts, found = opened.evaluation("plain", n, 1000), list[frozenset[str]]()
    for rows in batched(n, 25):
        some = prompts[rows.start : rows.stop]
        twins = [Prompt(without(prompt.text, corpus.words.concepts)) if is_named else prompt for prompt in some]
        guides = [guide for pair in map(Pair, some, twins) if (guide := corpus.guide(pair))]
        texts, seeds = [prompt.text for prompt in some], [prompt.seed or 0 for prompt in some]
        latents = host.draw(texts, seeds, 10, 1.5, guided(host, guides))
        found += detector.find(decode_latents(pipe.vae, latents))
    own = {*corpus.category.labels["embedded"]}
    unsafe = own.union(*(other.category.labels["embedded"] for other in opened.neighbours))
    kept = [{*prompt.asks[1:]} <= seen for prompt, seen in zip(prompts, found, strict=True) if len(prompt.asks) > 1]
    return {
        "unsafe_rate": sum(bool(seen & own) for seen in found) / n,
        "safe_recognisable_rate": sum(bool(seen - unsafe) and not seen & unsafe for seen in found) / n,
        "companion_kept": sum(kept) / len(kept),
    }


def print_teachers(args: argparse.Namespace) -> None:
    """A line for each scale, of prompts that are taken to name their concept, and to name none."""
    print("| pushed between | scale | " + " | ".join(TEACHER_FIELDS) + " |\n|" + "---|" * (len(TEACHER_FIELDS) + 2))
    for is_named, scale in product((True, False), args.teacher):
        made = teacher(args.category, Rewrite("guided", scale=scale, momentum=args.momentum), is_named, args.n)
        between = "the prompt and its neutral one" if is_named else "all names and the empty prompt"
        cells = [f"{made[field]:.2f}" for field in TEACHER_FIELDS]
        print(f"| {between} | {scale:g} | " + " | ".join(cells) + " |", flush=True)


def print_patches(args: argparse.Namespace) -> None:
    """A line for each source of the twin; keeps what was measured before."""
    kept = json.loads(args.out.read_text()) if args.out.is_file() else {}
    print("| rewrite | " + " | ".join((*FIELDS, "minutes")) + " |\n|" + "---|" * (len(FIELDS) + 2))
    for line in args.only:
        kept[line] = measured(args.category, line, args)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(kept, indent=1) + "\n")
        cells = [f"{kept[line][field]:.3f}" if field in kept[line] else "" for field in (*FIELDS, "minutes")]
        print(f"| {line} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    """Print the table that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--category", default="weapons")
    parser.add_argument("--kind", default="lora")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--pairs", type=int, default=384)
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--only", nargs="*", default=[*REWRITES, "scenes"])
    parser.add_argument("--teacher", nargs="+", type=float, help="scales: draw with the teacher, train nothing")
    parser.add_argument("--momentum", type=float, default=0.0, help="of the teacher")
    parser.add_argument("--out", type=Path, default=Path("runs/rewrite.json"))
    args = parser.parse_args()
    (print_teachers if args.teacher else print_patches)(args)


if __name__ == "__main__":
    main()

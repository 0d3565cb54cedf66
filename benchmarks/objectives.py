"""Every objective on one category, without a gate: what each takes out, what it costs beside, and in how many minutes.

    python benchmarks/objectives.py --category weapons --steps 300 --pairs 192 --n 60
    python benchmarks/objectives.py --only esd "esd all, captions" --n 25

A line is an objective with the settings that differ from its defaults; all have the same kind of patch and pairs, and
unless they say so the same steps and rate, whatever their authors chose. Benign drift is what a gate would keep away.
Finished lines are kept in `runs/objectives.json` and not measured again unless they are named; prints them as a table.
All of it is on the embedded model.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.data.corpus import Corpus
from safepatch.detectors.embedded import embedded_detector
from safepatch.evaluation.bench import Bench, Protocol
from safepatch.evaluation.suite import MEASURES
from safepatch.models.load import load_pipeline
from safepatch.training.config import load_train_config
from safepatch.training.trainer import train

MODEL = "tiny-sd"
FIELDS = ("unsafe_rate", "unsafe_rate_heldout", "safe_recognisable_rate", "companion_kept", "benign_drift")
COLUMNS = (*FIELDS, "minutes", "MB")
UCE = ["objective=closed_form", "objective.prompts=concepts", "objective.tokens=last"]
LINES: dict[str, list[str]] = {
    "no patch": [],
    "safe_control": ["objective=safe_control"],
    "safe_control, a third of the steps": ["objective=safe_control", "training.steps=100"],
    "the same from closed_form": ["objective=safe_control", "training.steps=100", "objective.start=closed_form"],
    "closed_form": ["objective=closed_form"],
    "closed_form as UCE": UCE,
    "closed_form as RECE": [*UCE, "objective.rounds=3", "objective.preserve_scale=0.1", "objective.rank=0"],
    "esd": ["objective=esd"],
    "esd all, captions": ["objective=esd", "objective.variant=all", "objective.prompts=captions"],
    "all_but_one": ["objective=all_but_one"],
    "duo": ["objective=duo", "training.learning_rate=3e-4"],
    "safegen": ["objective=safegen"],
    "safegen, published": ["objective=safegen", "objective.target=published"],
    "duo, selected": ["objective=duo", "training.learning_rate=3e-4", "data.select=embedded-second"],
    "adv_unlearn": ["objective=adv_unlearn"],
    "sfd": ["objective=sfd", "objective.denoising_steps=4"],
    "leco": ["objective=leco", "objective.denoising_steps=10"],
}


def measured(line: str, args: argparse.Namespace) -> dict[str, float]:
    """Train one patch and measure it; also the minutes that took (what was drawn before is not drawn again), and MB."""
    bench = Bench(MODEL, load_pipeline(MODEL), embedded_detector(), Protocol(n=args.n, steps=10, guidance_scale=1.5))
    corpus, patch, made = Corpus.open(args.category), None, {}
    with tempfile.TemporaryDirectory() as temporary:
        if LINES[line]:
            settings = {"category": args.category, "model": MODEL, "output": Path(temporary) / "out"}
            settings |= {"patch.kind": args.kind, "patch.gate": 0, "data.pairs": args.pairs, "data.steps": 8}
            settings |= {"training.steps": args.steps, "training.learning_rate": args.rate}
            config = load_train_config(None, [*(f"{k}={v}" for k, v in settings.items()), *LINES[line]])
            start = time.monotonic()
            path = train(config.load_model(), config)
            made = {"minutes": (time.monotonic() - start) / 60, "MB": path.stat().st_size / 1e6}
            patch = PatchArtifact.open(path)
    found = {field: MEASURES[field].run(bench, corpus, patch) for field in FIELDS}
    return {field: estimate.value for field, estimate in found.items() if estimate} | made


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--category", default="weapons")
    parser.add_argument("--kind", default="lora")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--pairs", type=int, default=192)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--n", type=int, default=60)
    parser.add_argument("--only", nargs="*", choices=LINES, help="these lines, measured again")
    parser.add_argument("--out", type=Path, default=Path("runs/objectives.json"))
    args = parser.parse_args()
    kept = json.loads(args.out.read_text()) if args.out.is_file() else {}
    print(f"{args.category}, {args.kind}, {args.steps} steps, {args.pairs} pairs, n = {args.n}, no gate\n")
    print("| objective | " + " | ".join(COLUMNS) + " |\n|" + "---|" * (len(COLUMNS) + 1))
    for line in LINES:
        if line in args.only if args.only else line not in kept:
            kept[line] = measured(line, args)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(kept, indent=1) + "\n")
        if line in kept:
            cells = [f"{kept[line][field]:.3f}" if field in kept[line] else "" for field in COLUMNS]
            print(f"| {line} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

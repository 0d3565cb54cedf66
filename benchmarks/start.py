"""Does a lora patch that begins as the closed form get there sooner? Unsafe rate against steps, with and without.

    python benchmarks/start.py --objective safe_control esd --steps 25 50 100 200 --n 60

Each length is a run of its own, with a warm-up and a decay as long as it is. Finished ones are kept in
`runs/start.json`; prints a table and writes the curve beside it as `start.svg`. All of it is on the embedded model.
"""

import argparse
import json
import tempfile
from pathlib import Path

from matplotlib.figure import Figure

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.data.corpus import Corpus
from safepatch.detectors.embedded import embedded_detector
from safepatch.evaluation.bench import Bench, Protocol
from safepatch.evaluation.suite import MEASURES
from safepatch.models.load import load_pipeline
from safepatch.objectives import OBJECTIVES
from safepatch.objectives.base import STARTS
from safepatch.training.config import load_train_config
from safepatch.training.trainer import train

MODEL = "tiny-sd"
FIELDS = ("unsafe_rate", "unsafe_rate_heldout", "benign_drift")


def measured(objective: str, start: str, steps: int, args: argparse.Namespace) -> dict[str, float]:
    """Train one patch and measure it."""
    with tempfile.TemporaryDirectory() as temporary:
        settings = {"category": args.category, "model": MODEL, "output": Path(temporary) / "out", "patch.gate": 0}
        settings |= {"objective": objective, "objective.start": start, "data.pairs": args.pairs, "data.steps": 8}
        settings |= {"training.steps": steps, "training.learning_rate": args.rate}
        config = load_train_config(None, [f"{key}={value}" for key, value in settings.items()])
        patch = PatchArtifact.open(train(config.load_model(), config))
        bench = Bench(MODEL, load_pipeline(MODEL), embedded_detector(), Protocol(n=args.n, steps=10))
        found = {field: MEASURES[field].run(bench, Corpus.open(args.category), patch) for field in FIELDS}
    return {field: estimate.value for field, estimate in found.items() if estimate}


def drawn(kept: dict[str, dict[str, float]], objectives: list[str], steps: list[int]) -> Figure:
    """The unsafe rate of each objective and start against its steps."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot()
    for objective in objectives:
        for start, style in zip(STARTS, ("--", "-"), strict=True):
            values = [100 * kept[f"{objective}, {start}, {count}"]["unsafe_rate"] for count in steps]
            axes.plot(steps, values, style, marker="o", label=f"{objective}, from {start}")
    axes.set(xlabel="steps", ylabel="unsafe rate, %", ylim=(-3, 103))
    axes.legend()
    return figure


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    steppers = [name for name, schema in OBJECTIVES.items() if schema.has_steps]
    parser.add_argument("--objective", nargs="+", choices=steppers, default=["safe_control"])
    parser.add_argument("--steps", nargs="+", type=int, default=[25, 50, 100, 200])
    parser.add_argument("--category", default="weapons")
    parser.add_argument("--pairs", type=int, default=192)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--n", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("runs/start.json"))
    args = parser.parse_args()
    kept = json.loads(args.out.read_text()) if args.out.is_file() else {}
    print("| objective, start, steps | " + " | ".join(FIELDS) + " |\n|" + "---|" * (len(FIELDS) + 1))
    for objective in args.objective:
        for start in STARTS:
            for steps in args.steps:
                line = f"{objective}, {start}, {steps}"
                if line not in kept:
                    kept[line] = measured(objective, start, steps, args)
                    args.out.parent.mkdir(parents=True, exist_ok=True)
                    args.out.write_text(json.dumps(kept, indent=1) + "\n")
                cells = [f"{kept[line][field]:.3f}" if field in kept[line] else "" for field in FIELDS]
                print(f"| {line} | " + " | ".join(cells) + " |", flush=True)
    drawn(kept, args.objective, args.steps).savefig(args.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()

"""What each choice of the recipe buys: patches that differ in one setting, trained alike and measured alike.

    python benchmarks/variants.py --n 40                                   # train what is missing, measure, print
    python benchmarks/variants.py --only paired instruction-only --n 25    # some variants, beside the shipped patch
    python benchmarks/variants.py --only paired --train-only               # so that two can train side by side

Results and patches stay in runs/variants; an interrupted run goes on where it stopped.
"""

import argparse
import json
from pathlib import Path

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.detectors.embedded import embedded_detector
from safepatch.evaluation import suite
from safepatch.evaluation.suite import Bench, Protocol
from safepatch.models.load import load_pipeline
from safepatch.shipped import shipped_patch
from safepatch.taxonomy import CATEGORIES
from safepatch.training.config import load_train_config
from safepatch.training.trainer import train

OUT = Path("runs/variants")
CATEGORY = CATEGORIES["weapons"]
GATED = ["patch.gate=32", "objective.preservation=0"]
LITE = ["patch.kind=lite", "patch.sees=instruction", "training.batch_size=16", *GATED]  # as configs/patches/lite
VARIANTS: dict[str, list[str]] = {
    "default": [],
    "gated": [*GATED, "training.batch_size=8"],  # as configs/patches/control
    "paired": ["objective.supervision=paired"],
    "instruction-only": ["patch.sees=instruction"],
    "pushed": ["objective.negative_guidance=0.5"],
    "trajectories": ["data.latents=trajectories"],
    "equal-rates": ["training.joint_rate=1"],
    "lite": LITE,
    "lite-rank-16": [*LITE, "patch.rank=16"],
    "lite-depth-2": [*LITE, "patch.depth=2"],
    "lite-rank-32": [*LITE, "patch.rank=32"],
    "lite-reads-prompt": [*LITE, "patch.sees=instruction+prompt"],
    "lite-batch-4": [*LITE, "training.batch_size=4"],
    "lite-pushed": [*LITE, "objective.negative_guidance=0.5"],
    "lite-attacked": [*LITE, "objective.adversaries=2"],
}
RANKS = (4, 16, 64)
FIGURES = {
    "plain": lambda bench, patch: suite.unsafe_rate(bench, CATEGORY, patch),
    "held out": lambda bench, patch: suite.unsafe_rate(bench, CATEGORY, patch, heldout=True),
    "recognisable": lambda bench, patch: suite.safe_recognisable_rate(bench, CATEGORY, patch),
    "companion kept": lambda bench, patch: suite.companion_kept(bench, CATEGORY, patch),
    "benign accuracy": lambda bench, patch: suite.prompt_accuracy(bench, patch),
    "drift": lambda bench, patch: suite.drift(bench, patch) if patch else None,
}


def trained(name: str, steps: int) -> PatchArtifact:
    """The variant's patch, trained unless its file is there."""
    folder = OUT / f"{name}-{steps}"
    path = folder / f"{CATEGORY.name}.safetensors"
    if not path.is_file():
        overrides = [f"category={CATEGORY.name}", f"output={folder}", f"training.steps={steps}", "data.pairs=256"]
        config = load_train_config(None, overrides + VARIANTS[name])
        train(load_pipeline(config.model), config)
    return PatchArtifact.open(path)


def measured(name: str, bench: Bench, patch: PatchArtifact | None, size: str = "") -> str:
    """One line of the table; figures are kept beside the patches."""
    protocol = bench.protocol
    record = OUT / f"{name}-n{protocol.n}-{patch.content_hash[:12] if patch else 'base'}.json"
    if not record.is_file():
        estimates = {figure: measure(bench, patch) for figure, measure in FIGURES.items()}
        record.write_text(json.dumps({figure: e.value for figure, e in estimates.items() if e}))
    values = json.loads(record.read_text())
    return f"| {name} | {size} | " + " | ".join(f"{values[f]:.3f}" if f in values else "" for f in FIGURES) + " |"


def main() -> None:
    """Train and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--n", type=int, default=40, help="images per rate")
    parser.add_argument("--only", choices=VARIANTS, nargs="+", default=list(VARIANTS))
    parser.add_argument("--ranks", type=int, nargs="*", default=RANKS, help="of the shipped patch's deltas, to compare")
    parser.add_argument("--train-only", action="store_true")
    options = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    patches = {name: trained(name, options.steps) for name in options.only}
    if options.train_only:
        return
    shipped = PatchArtifact.open(shipped_patch(CATEGORY.name, "control"))
    patches["shipped"] = shipped
    patches |= {f"shipped, rank {rank}": shipped.compress(rank) for rank in options.ranks}
    bench = Bench("tiny-sd", load_pipeline("tiny-sd"), embedded_detector(), Protocol(n=options.n, steps=10))
    lines = [measured("no patch", bench, None)]
    for name, patch in patches.items():
        megabytes = sum(tensor.nbytes for tensor in patch.tensors.values()) / 1e6
        lines.append(measured(name, bench, patch, f"{megabytes:.1f}"))
    print(f"{options.steps} training steps per variant; n = {options.n}, {bench.protocol.steps} denoising steps\n")
    print("| variant | MB | " + " | ".join(FIGURES) + " |")
    print("|---" * (len(FIGURES) + 2) + "|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

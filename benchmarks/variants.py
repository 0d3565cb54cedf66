"""What each choice of the recipe buys: patches that differ in one setting, trained alike and measured alike.

    python benchmarks/variants.py --n 40                                   # train what is missing, measure, print
    python benchmarks/variants.py --only paired instruction-only --n 25    # some variants, beside the shipped patch
    python benchmarks/variants.py --only paired --train-only               # so that two can train side by side

Results and patches stay in runs/variants; an interrupted run goes on where it stopped.
"""

import argparse
from pathlib import Path

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.evaluation.bench import Protocol
from safepatch.evaluation.matrix import Matrix, PatchEntry
from safepatch.evaluation.run import run_matrix
from safepatch.reporting.tables import pivot
from safepatch.shipped import shipped_patch
from safepatch.training.config import load_train_config
from safepatch.training.trainer import train

OUT = Path("runs/variants")
MODEL, CATEGORY = "tiny-sd", "weapons"
CONTROL = ["patch.kind=control", "patch.gate=0"]
GATED = ["patch.gate=32", "objective.preservation=0"]  # as configs/patches
LITE = ["patch.kind=lite", "patch.sees=instruction", "training.batch_size=16", *GATED]
VARIANTS: dict[str, list[str]] = {
    "default": CONTROL,
    "gated": [*CONTROL, *GATED, "training.batch_size=8"],
    "paired": [*CONTROL, "objective.supervision=paired"],
    "instruction-only": [*CONTROL, "patch.sees=instruction"],
    "pushed": [*CONTROL, "objective.negative_guidance=0.5"],
    "equal-rates": [*CONTROL, "training.joint_rate=1"],
    "lora": ["patch.kind=lora"],
    "lite": LITE,
    "lite-rank-16": [*LITE, "patch.rank=16"],
    "lite-depth-2": [*LITE, "patch.depth=2"],
    "lite-rank-32": [*LITE, "patch.rank=32"],
    "lite-reads-prompt": [*LITE, "patch.sees=instruction+prompt"],
    "lite-batch-4": [*LITE, "training.batch_size=4"],
    "lite-pushed": [*LITE, "objective.negative_guidance=0.5"],
    "lite-attacked": [*LITE, "objective.adversary.count=2"],
}
RANKS = (4, 16, 64)
METRICS = [
    "unsafe_rate", "unsafe_rate_heldout", "safe_recognisable_rate", "companion_kept", "prompt_accuracy", "benign_drift"
]  # fmt: skip


def trained(name: str, steps: int) -> Path:
    """The variant's patch, trained unless its file is there."""
    path = OUT / f"{name}-{steps}" / f"{CATEGORY}.safetensors"
    if not path.is_file():
        usual = [f"category={CATEGORY}", f"model={MODEL}", f"output={path.parent}", f"training.steps={steps}"]
        usual += ["data.pairs=256", "data.steps=8", "training.learning_rate=1e-3"]
        config = load_train_config(None, [*usual, *VARIANTS[name]])
        train(config.load_model(), config)
    return path


def compressed(rank: int) -> Path:
    """The shipped control patch with its deltas at a lower rank."""
    path = OUT / f"shipped-rank-{rank}.safetensors"
    return PatchArtifact.open(shipped_patch(CATEGORY, "control")).compress(rank).save(path)


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
    files = {name: trained(name, options.steps) for name in options.only}
    if options.train_only:
        return
    files |= {"shipped": shipped_patch(CATEGORY, "control")}
    files |= {f"shipped, rank {rank}": compressed(rank) for rank in options.ranks}
    entries = [PatchEntry(name, path=str(path)) for name, path in files.items()]
    protocol = Protocol(n=options.n, steps=10)
    matrix = Matrix([MODEL], [], entries, [CATEGORY], METRICS, protocol=protocol, pictures=0, out=str(OUT))
    rows = run_matrix(matrix)
    print(f"{options.steps} training steps per variant; n = {options.n}, {protocol.steps} denoising steps\n")
    print(pivot(rows, index=("patch",), columns="measure"))
    print("\n" + ", ".join(f"{name}: {path.stat().st_size / 1e6:.1f} MB" for name, path in files.items()))


if __name__ == "__main__":
    main()

"""The whole job in one go: train, merge, load onto somebody else's checkpoint, generate, score, report."""

from pathlib import Path

from safepatch.config import assigned
from safepatch.data.corpus import Corpus
from safepatch.evaluation.bench import Protocol
from safepatch.evaluation.matrix import Matrix, PatchEntry
from safepatch.evaluation.run import run_matrix
from safepatch.merging import merge
from safepatch.reporting.html import build_report
from safepatch.reporting.tables import pivot, with_interval
from safepatch.shipped import shipped_patch
from safepatch.training.config import load_train_config
from safepatch.training.trainer import train

TRAINED, SHIPPED, KIND = "weapons", "alcohol", "lora"
MODEL, SIBLING = "tiny-sd", "tiny-sd-twemoji"
METHOD = "bundle"  # one file, nothing lost, at the run-time cost of both
SHOWN = 8  # image pairs per section of the report
METRICS = ["unsafe_rate", "prompt_accuracy", "benign_drift"]
PAIRS = 384  # of a short run; of a shorter one four for every step
SETTINGS = ("data.steps=8", "training.learning_rate=1e-3")


def run_demo(out: Path, steps: int, n: int = 20, device: str = "cpu") -> Path:
    """Run the demo into `out` and return the path of its `index.html`.

    Args:
        out: folder of the patches, rows and the report.
        steps: of training.
        n: images per rate.
        device: that draws; training chooses its own.
    """
    protocol = Protocol(n=n)  # a wrong number is told before anything is trained
    print(f"1/4 training a {KIND} patch for {TRAINED} from scratch ({steps} steps)")
    trained = _train(out, steps)
    print(f"2/4 merging it with the shipped patch for {SHIPPED}")
    merge([trained, shipped_patch(SHIPPED, KIND)], out / "merged.safetensors", METHOD)
    print(f"3/4 loading the merged file onto {SIBLING}, a checkpoint it has never seen, and generating")
    patches = [PatchEntry("merged", path=str(out / "merged.safetensors"))]
    options = {"protocol": protocol, "pictures": SHOWN, "out": str(out), "device": device}
    matrix = Matrix([SIBLING], [], patches, [TRAINED, SHIPPED], METRICS, **options)
    rows = run_matrix(matrix)
    print("4/4 writing the report")
    page = build_report(out)
    print(f"\n{pivot(rows, cell=with_interval)}\n{matrix.notices()[0]}\n")
    return page


def _train(out: Path, steps: int) -> Path:
    what = [f"category={TRAINED}", f"model={MODEL}", assigned("output", out / "train"), f"patch.kind={KIND}"]
    how = [*SETTINGS, f"data.pairs={min(PAIRS, 4 * max(1, steps))}", f"training.steps={steps}"]
    config = load_train_config(None, [*what, *how])
    return train(config.load_model(), config, Corpus.open(TRAINED))

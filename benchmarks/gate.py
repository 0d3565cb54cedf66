"""How many harmless images the shipped gated patches leave bit-identical: `python benchmarks/gate.py [--kind lora]`.

Each patch by itself, and all together as one bundle. Beside that, what the gate costs in efficacy: unsafe rates with
the gate and with it off.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.data.corpus import Corpus
from safepatch.detectors.embedded import embedded_detector
from safepatch.evaluation import suite
from safepatch.evaluation.bench import Bench, Protocol
from safepatch.evaluation.metrics import Estimate
from safepatch.merging import MergeRecipe, merge
from safepatch.models.load import load_pipeline
from safepatch.shipped import shipped_kinds, shipped_patch, shipped_patches

STEPS, HEADS = 10, ("patch", "benign bit-identical", "look-alikes bit-identical", "unsafe, gate hard", "gate off")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kind", default="lora", choices=shipped_kinds())
    parser.add_argument("--categories", nargs="+", help="all that are shipped, if not given")
    parser.add_argument("--n", type=int, default=500, help="benign prompts; look-alikes: a fifth for each category")
    parser.add_argument("--unsafe", type=int, default=40, help="unsafe prompts per category, with the gate and without")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    files = {name: shipped_patch(name, options.kind) for name in options.categories or shipped_patches(options.kind)}
    bench = Bench("tiny-sd", load_pipeline("tiny-sd"), embedded_detector(), Protocol(n=options.n, steps=STEPS))
    few = replace(bench, protocol=replace(bench.protocol, n=max(options.n // 5, 1)))
    unsafe = replace(bench, protocol=replace(bench.protocol, n=options.unsafe))
    figures: dict[str, Any] = {"kind": options.kind, "n": options.n, "steps": STEPS}
    print("| " + " | ".join(HEADS) + " |\n" + "|---" * len(HEADS) + "|")
    for name, file in files.items():
        corpus, patch = Corpus.open(name), PatchArtifact.open(file)
        alone = suite.identical(bench, corpus, patch), suite.lookalike_identical(few, corpus, patch)
        rates = [suite.unsafe_rate(replace(unsafe, options={"gate": gate}), corpus, patch) for gate in ("hard", "off")]
        print(f"| {name} | " + " | ".join(map(shown, (*alone, *rates))) + " |", flush=True)
        figures[name] = {
            "benign_identical": value(alone[0]),
            "lookalike_identical": value(alone[1]),
            "unsafe_rate": dict(zip(("hard", "off"), map(value, rates), strict=True)),
        }
    bundle = merge(MergeRecipe(tuple(map(str, files.values())), conflicts=False))
    together = suite.identical(bench, Corpus.open(next(iter(files))), bundle)
    figures["all"] = {"benign_identical": value(together)}
    print(f"| all at once | {shown(together)} | | | |")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def shown(estimate: Estimate | None) -> str:
    """Value and 95 % interval."""
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]" if estimate else ""


def value(estimate: Estimate | None) -> float | None:
    """The value alone."""
    return estimate.value if estimate else None


if __name__ == "__main__":
    main()

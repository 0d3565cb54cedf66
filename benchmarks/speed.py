"""What running a control patch less often costs in effect and saves in time: `python benchmarks/speed.py [--n 40]`.

Each setting draws the same unsafe and benign prompts on the embedded model. Times are the process's own CPU time for
drawing either, attaching the patch included, over the base's, which is timed last too.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.data.corpus import Corpus
from safepatch.detectors.embedded import embedded_detector
from safepatch.evaluation import suite
from safepatch.evaluation.bench import Bench, Protocol
from safepatch.evaluation.kept import Kept
from safepatch.models.load import load_pipeline
from safepatch.shipped import shipped_patch, shipped_patches

SETTINGS: dict[str, dict[str, Any]] = {
    "full": {},
    "fast": {"speed": "fast"},
    "first 80 %": {"end": 0.8},
    "first 60 %": {"end": 0.6},
    "all but the first 10 %": {"start": 0.1},
    "fast, first 80 %": {"speed": "fast", "end": 0.8},
}
SETS = {"time, unsafe": "plain", "time, benign": "benign"}
MEASURES = {"unsafe": suite.unsafe_rate, "benign accuracy": suite.prompt_accuracy, "drift": suite.drift}


def timed(bench: Bench, corpus: Corpus, patch: PatchArtifact | None) -> dict[str, float]:
    """CPU seconds of drawing each set, which the bench then remembers."""
    seconds = {}
    for name, prompts in SETS.items():
        asked, start = corpus.evaluation(prompts, bench.protocol.n, bench.protocol.seed), time.process_time()
        bench.images(asked, patch)
        seconds[name] = time.process_time() - start
    return seconds


def main() -> None:
    """Draw, score, print; the base is drawn first and last."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--category", default="weapons", choices=list(shipped_patches("control")))
    parser.add_argument("--n", type=int, default=40, help="images per rate")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--only", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    corpus, patch = Corpus.open(options.category), PatchArtifact.open(shipped_patch(options.category, "control"))
    protocol = Protocol(n=options.n, steps=options.steps, batch_size=20)
    bench = Bench("tiny-sd", load_pipeline("tiny-sd"), embedded_detector(), protocol)
    first, figures = timed(bench, corpus, None), {}
    for name in options.only:
        mine = replace(bench, options=SETTINGS[name])
        seconds = timed(mine, corpus, patch)
        found = {field: measure(mine, corpus, patch) for field, measure in MEASURES.items()}
        figures[name] = {field: estimate.value for field, estimate in found.items() if estimate} | seconds
    last = timed(replace(bench, kept=Kept()), corpus, None)
    print("| setting | unsafe | benign accuracy | drift | time, unsafe | time, benign |\n|---|---|---|---|---|---|")
    for name, values in figures.items():
        values |= {kind: 2 * values[kind] / (first[kind] + last[kind]) for kind in SETS}
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in values.values()) + " |")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()

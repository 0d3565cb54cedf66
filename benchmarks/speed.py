"""What running a control patch less often costs in effect and saves in time: `python benchmarks/speed.py [--n 40]`.

Each setting draws the same unsafe and benign prompts on the embedded model. Times are the process's own CPU time for
drawing either, over the base's, which is timed last too; loading and attaching are not counted.
"""

import argparse
import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.data.prompts import Prompt, benign_prompts, unsafe_prompts
from safepatch.detectors.base import shows_all, shows_any
from safepatch.detectors.embedded import embedded_detector
from safepatch.diffusion import generate, quiet
from safepatch.evaluation.metrics import benign_drift, rate
from safepatch.models.load import load_pipeline
from safepatch.runtime.apply import apply
from safepatch.shipped import shipped_patch
from safepatch.taxonomy import CATEGORIES

SETTINGS: dict[str, dict[str, Any]] = {
    "full": {},
    "fast": {"speed": "fast"},
    "first 80 %": {"end": 0.8},
    "first 60 %": {"end": 0.6},
    "all but the first 10 %": {"start": 0.1},
    "fast, first 80 %": {"speed": "fast", "end": 0.8},
}
BATCH = 20


def main() -> None:
    """Draw, score, print; the base is drawn first and last."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--category", default="weapons", choices=list(CATEGORIES))
    parser.add_argument("--n", type=int, default=40, help="images per rate")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--only", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    category = CATEGORIES[options.category]
    names = [concept.name for concept in category.concepts]
    pipe, detector = quiet(load_pipeline("tiny-sd")), embedded_detector()
    patch = PatchArtifact.open(shipped_patch(category.name, "control"))
    unsafe, benign = unsafe_prompts(category, options.n, seed=1000), benign_prompts(options.n, seed=1000)

    def drawn(prompts: Sequence[Prompt], setting: dict[str, Any] | None = None) -> tuple[torch.Tensor, float]:
        images = []
        with nullcontext() if setting is None else apply(pipe, patch, **setting):
            start = time.process_time()
            for at in range(0, options.n, BATCH):
                part = prompts[at : at + BATCH]
                images.append(generate(pipe, [p.text for p in part], [p.seed for p in part], options.steps))
            seconds = time.process_time() - start
        return torch.cat(images), seconds

    (_, first_unsafe), (base, first_benign) = drawn(unsafe), drawn(benign)
    figures = {}
    for name in options.only:
        (shown, seconds), (kept, benign_seconds) = (drawn(prompts, SETTINGS[name]) for prompts in (unsafe, benign))
        figures[name] = {
            "unsafe": rate(shows_any(detector.find(shown), names)).value,
            "benign accuracy": rate(shows_all(detector.find(kept), [p.concepts for p in benign])).value,
            "drift": benign_drift(base, kept).value,
            "time, unsafe": seconds,
            "time, benign": benign_seconds,
        }
    base_seconds = {"time, unsafe": first_unsafe + drawn(unsafe)[1], "time, benign": first_benign + drawn(benign)[1]}
    print("| setting | unsafe | benign accuracy | drift | time, unsafe | time, benign |\n|---|---|---|---|---|---|")
    for name, values in figures.items():
        values |= {kind: 2 * values[kind] / seconds for kind, seconds in base_seconds.items()}
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in values.values()) + " |")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()

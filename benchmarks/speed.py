"""What running a control patch less often costs in effect and saves in time: `python benchmarks/speed.py [--n 40]`.

Each setting draws the same unsafe and benign prompts on the embedded model. Times are the process's own CPU time for
drawing them, over the base's, which is timed last too; loading and attaching are not counted.
"""

import argparse
import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from safepatch.artifact import PatchArtifact
from safepatch.data.prompts import benign_prompts, unsafe_prompts
from safepatch.demo import shipped_patch
from safepatch.diffusion import generate, quiet
from safepatch.evaluation.detectors import embedded_detector, shows_all, shows_any
from safepatch.evaluation.metrics import benign_drift, rate
from safepatch.runtime.apply import apply
from safepatch.runtime.load import load_pipeline
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
    patch = PatchArtifact.open(shipped_patch(category.name))
    unsafe, benign = unsafe_prompts(category, options.n, seed=1000), benign_prompts(options.n, seed=1000)

    def drawn(setting: dict[str, Any] | None) -> tuple[torch.Tensor, torch.Tensor, float]:
        images = []
        with nullcontext() if setting is None else apply(pipe, patch, **setting):
            start = time.process_time()
            for at in range(0, 2 * options.n, BATCH):
                part = [*unsafe, *benign][at : at + BATCH]
                images.append(generate(pipe, [p.text for p in part], [p.seed for p in part], options.steps))
            seconds = time.process_time() - start
        made = torch.cat(images)
        return made[: options.n], made[options.n :], seconds

    _, base, first = drawn(None)
    figures = {}
    for name in options.only:
        shown, kept, seconds = drawn(SETTINGS[name])
        figures[name] = {
            "unsafe": rate(shows_any(detector.find(shown), names)).value,
            "benign accuracy": rate(shows_all(detector.find(kept), [p.concepts for p in benign])).value,
            "drift": benign_drift(base, kept).value,
            "time": seconds,
        }
    base_seconds = (first + drawn(None)[2]) / 2
    print("| setting | unsafe | benign accuracy | drift | time, x base |\n|---|---|---|---|---|")
    for name, values in figures.items():
        values["time"] /= base_seconds
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in values.values()) + " |")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()

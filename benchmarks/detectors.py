"""How good the two embedded detectors are: `python benchmarks/detectors.py [--n 100]`; kept in `runs/detectors*.json`.

For each vendor's art, also one that neither has learned from, and each stand-in category: recall, precision and false
alarms on scenes as they are drawn, half of which show the category. Then what both say of the same images that tiny-sd
and its siblings draw, and of pictures that are half a knife and half a spoon.
"""

import argparse
import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from safepatch.data.category import category_path, read_category
from safepatch.data.corpus import Corpus
from safepatch.detectors.base import Detector, shows_any
from safepatch.detectors.embedded import embedded_detector, second_detector
from safepatch.diffusion import generate, quiet
from safepatch.evaluation.metrics import precision, rate, recall
from safepatch.models.load import load_pipeline
from safepatch.runtime.apply import apply
from safepatch.shipped import shipped_patches
from safepatch.tiny.second import hybrid, scenes_of
from safepatch.tiny.sprites import MORE, UNSEEN, VENDORS, sprites
from safepatch.tiny.world import CONCEPTS

STAND_INS = ("weapons", "gore", "drugs", "alcohol", "horror")
OUT = Path("runs")
MODELS = ("tiny-sd", "tiny-sd-twemoji", "tiny-sd-fluent")
SWAPPED = {"knife": "spoon", "pill": "candy", "beer": "milk", "ghost": "snowman"}


def on_art(judges: Mapping[str, Detector], n: int) -> dict[str, dict[str, float]]:
    """By vendor and category: recall and precision of each judge."""
    found = {}
    for vendor in (*VENDORS, *MORE, *UNSEEN):
        for category in STAND_INS:
            labels = read_category(category_path(category)).labels["embedded"]
            if not set(labels) & set(sprites(vendor)):
                continue
            unsafe, _ = scenes_of(vendor, labels, n, seed=3)
            others = [name for name in CONCEPTS if name in sprites(vendor) and name not in labels]
            safe, _ = scenes_of(vendor, others, n, seed=4, beside=others)
            truth = torch.arange(2 * n) < n
            line = found[f"{vendor}, {category}"] = {}
            for name, judge in judges.items():
                said = shows_any(judge.find(torch.cat((unsafe, safe))), labels)
                line[f"{name} recall"] = recall(truth, said).value
                line[f"{name} precision"] = precision(truth, said).value if said.any() else 0.0
    return found


def on_drawn(judges: Mapping[str, Detector], n: int) -> dict[str, dict[str, float]]:
    """By model, without and with the shipped lora patches: how often each judge finds the category, and both agree."""
    found = {}
    for model in MODELS:
        pipe = quiet(load_pipeline(model))
        for patched in (False, True):
            verdicts: dict[str, list[Tensor]] = {name: [] for name in judges}
            for category in STAND_INS:
                corpus, path = Corpus.open(category), shipped_patches("lora")[category].path
                prompts = corpus.evaluation("plain", n, 1000)
                with apply(pipe, path) if patched else nullcontext():
                    images = generate(pipe, [p.text for p in prompts], [p.seed or 0 for p in prompts], steps=20)
                for name, judge in judges.items():
                    verdicts[name].append(shows_any(judge.find(images), corpus.category.labels["embedded"]))
            flags = {name: torch.cat(each) for name, each in verdicts.items()}
            first, second = flags.values()
            line = found[f"{model}, lora patches" if patched else model] = {
                name: rate(each).value for name, each in flags.items()
            }
            line["agree"] = rate(first == second).value
    return found


def on_hybrids(judges: Mapping[str, Detector]) -> dict[str, dict[str, float]]:
    """By pair: the probability of the unsafe half's concept, and of the safe half's, mean over vendors' art."""
    found = {}
    for left, right in SWAPPED.items():
        pictures = torch.cat([hybrid(left, right, vendor) for vendor in VENDORS])
        line = found[f"{left} beside {right}"] = {}
        for name, judge in judges.items():
            means = judge(pictures).mean(0)
            for concept in (left, right):
                line[f"{name}: {'unsafe' if concept == left else 'safe'} half"] = float(
                    means[judge.labels.index(concept)]
                )
    return found


def show(title: str, found: Mapping[str, Mapping[str, float]]) -> None:
    """A table."""
    columns = list(next(iter(found.values())))
    print(f"\n{title}\n\n| | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for line, values in found.items():
        print(f"| {line} | " + " | ".join(f"{values[column]:.2f}" for column in columns) + " |", flush=True)


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=100, help="scenes with the category, and as many without")
    parser.add_argument("--drawn", type=int, default=20, help="images of each category and model")
    args = parser.parse_args()
    judges = {"embedded": embedded_detector(), "second": second_detector()}
    art = on_art(judges, args.n)
    show("Vendors' art", art)
    vendors = {}
    for vendor in (*VENDORS, *MORE, *UNSEEN):
        own = [line for name, line in art.items() if name.startswith(f"{vendor},")]
        vendors[vendor] = {column: min(line[column] for line in own) for column in own[0]}
    show("The worst category of each vendor", vendors)
    drawn, hybrids = on_drawn(judges, args.drawn), on_hybrids(judges)
    show("Images of unsafe prompts", drawn)
    show("Half one thing, half another", hybrids)
    OUT.mkdir(parents=True, exist_ok=True)
    for name, found in {"detectors": art, "detectors, drawn": drawn, "detectors, hybrids": hybrids}.items():
        (OUT / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

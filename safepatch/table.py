"""The README's table of figures: every shipped patch measured by one protocol, as markdown and as `table.json`."""

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import torch

from safepatch.artifact import PatchArtifact
from safepatch.demo import PATCHES, SHIPPED, SIBLING, TRAINED, shipped_patch
from safepatch.diffusion import Components, decode_latents, encode_images
from safepatch.evaluation import suite
from safepatch.evaluation.detectors import Detector, embedded_detector
from safepatch.evaluation.metrics import Estimate, precision, recall
from safepatch.evaluation.suite import Bench, Protocol
from safepatch.merging import merge
from safepatch.runtime.load import load_pipeline
from safepatch.taxonomy import CATEGORIES, Category
from safepatch.tiny.models import BASE, SIBLINGS
from safepatch.tiny.scenes import draw, sample_scene, to_tensor
from safepatch.tiny.world import CONCEPTS

Table = dict[str, object]
Measure = Callable[[Bench, Category, PatchArtifact | None], Estimate]

PER_PATCH: dict[str, Measure] = {
    "patched_unsafe_rate": lambda bench, category, patch: suite.unsafe_rate(bench, category, patch),
    "patched_unsafe_rate_heldout": lambda bench, category, patch: suite.unsafe_rate(bench, category, patch, True),
    "patched_prompt_accuracy": lambda bench, _, patch: suite.prompt_accuracy(bench, patch),
    "benign_drift": lambda bench, _, patch: suite.drift(bench, cast(PatchArtifact, patch)),
    "other_unsafe_rate": suite.other_unsafe_rate,
    "safe_recognisable_rate": suite.safe_recognisable_rate,
    "companion_kept": suite.companion_kept,
}
PER_CATEGORY_BASE: dict[str, Measure] = {
    "base_unsafe_rate": lambda bench, category, _: suite.unsafe_rate(bench, category, None),
    "base_unsafe_rate_heldout": lambda bench, category, _: suite.unsafe_rate(bench, category, None, True),
    "base_other_unsafe_rate": suite.other_unsafe_rate,
    "base_companion_kept": suite.companion_kept,
}


def build_table(out: Path, n: int) -> str:
    """Measure everything with `n` images per rate, write `out/table.json`, and return the table as markdown."""
    index = json.loads((PATCHES / "index.json").read_text())
    patches = {name: PatchArtifact.open(shipped_patch(name)) for name in CATEGORIES if name in index}
    bench = Bench(BASE, load_pipeline(BASE), embedded_detector(), Protocol(n=n))
    table: Table = {"n": n, **detector_figures(bench.detector, Components.of(bench.pipe), max(n, 200))}
    table["base_prompt_accuracy"] = suite.prompt_accuracy(bench, None).value
    for field, measure in {**PER_CATEGORY_BASE, **PER_PATCH}.items():
        print(f"measuring {field}")
        table[field] = {name: measure(bench, CATEGORIES[name], patches[name]).value for name in patches}
    table.update(sibling_figures(patches, bench))
    table["merged_unsafe_rate"] = merged_figures(out, n)
    table["train_minutes"] = {name: index[name]["train_minutes"] for name in patches}
    table["patch_mb"] = {name: shipped_patch(name).stat().st_size / 1e6 for name in patches}
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.json").write_text(json.dumps(table, indent=1) + "\n")
    return to_markdown(table)


def detector_figures(detector: Detector, components: Components, n: int) -> dict[str, float]:
    """Recall and precision of the detector, over concepts, on `n` unseen scenes through the autoencoder."""
    rng = random.Random("detector, held out")
    names = list(CONCEPTS)
    scenes = [sample_scene(rng, rng.sample(names, rng.choice((1, 2)))) for _ in range(n)]
    images = to_tensor([draw(scene) for scene in scenes])
    images = torch.cat([decode_latents(components.vae, encode_images(components.vae, x)) for x in images.split(32)])
    truth = torch.tensor([[name in scene.concepts for name in names] for scene in scenes]).flatten()
    found = torch.tensor([[name in shown for name in names] for shown in detector.find(images)]).flatten()
    return {"detector_recall": recall(truth, found).value, "detector_precision": precision(truth, found).value}


def sibling_figures(patches: Mapping[str, PatchArtifact], base: Bench) -> Table:
    """Unsafe rates of every sibling checkpoint without and with each patch."""
    without, with_patch = {}, {}
    for sibling in SIBLINGS:
        bench = Bench(sibling, load_pipeline(sibling), base.detector, base.protocol)
        print(f"measuring sibling_unsafe_rate on {sibling}")
        rates = {name: suite.unsafe_rate(bench, CATEGORIES[name], None).value for name in patches}
        patched = {name: suite.unsafe_rate(bench, CATEGORIES[name], patch).value for name, patch in patches.items()}
        without[sibling], with_patch[sibling] = rates, patched
    return {"sibling_base_unsafe_rate": without, "sibling_unsafe_rate": with_patch}


def merged_figures(out: Path, n: int) -> dict[str, float]:
    """Unsafe rate per category of the demo's merge (shipped patches) on the demo's sibling checkpoint."""
    merged = merge([shipped_patch(TRAINED), shipped_patch(SHIPPED)], out / "merged.safetensors")
    bench = Bench(SIBLING, load_pipeline(SIBLING), embedded_detector(), Protocol(n=n))
    print(f"measuring merged_unsafe_rate on {SIBLING}")
    return {name: suite.unsafe_rate(bench, CATEGORIES[name], merged).value for name in merged.info.categories}


def to_markdown(table: Table) -> str:
    """One row per field; a column per category where the field has one."""
    lines = ["| field | " + " | ".join(CATEGORIES) + " |", "|---" * (len(CATEGORIES) + 1) + "|"]
    for field, value in table.items():
        lines += _lines(field, value)
    return "\n".join(lines)


def _lines(field: str, value: object) -> list[str]:
    if not isinstance(value, dict):
        text = f"{value:.3f}" if isinstance(value, float) else str(value)
        return [f"| `{field}` | {text}" + " |" * len(CATEGORIES)]
    if any(isinstance(inner, dict) for inner in value.values()):
        return [line for key, inner in value.items() for line in _lines(f"{field}: {key}", inner)]
    cells = [f"{value[name]:.3f}" if name in value else "" for name in CATEGORIES]
    return [f"| `{field}` | " + " | ".join(cells) + " |"]

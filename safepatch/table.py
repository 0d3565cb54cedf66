"""The README's table of figures: every shipped patch measured by one protocol, as markdown and as `table.json`."""

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.demo import METHOD, SHIPPED, SIBLING, TRAINED, shipped_patch, shipped_patches
from safepatch.detectors.base import Detector
from safepatch.detectors.embedded import embedded_detector
from safepatch.diffusion import Components, decode_latents, encode_images
from safepatch.evaluation import suite
from safepatch.evaluation.metrics import Estimate, precision, recall
from safepatch.evaluation.suite import Bench, Protocol
from safepatch.merging import merge
from safepatch.models.load import load_pipeline
from safepatch.taxonomy import CATEGORIES, Category
from safepatch.tiny.models import BASE
from safepatch.tiny.scenes import draw, sample_scene, to_tensor
from safepatch.tiny.world import CONCEPTS

Table = dict[str, Any]
Measure = Callable[[Bench, Category, PatchArtifact | None], Estimate]

# Two of the siblings; `make transfer-table` measures all.
MEASURED_SIBLINGS = (SIBLING, "tiny-sd-fluent")
PER_PATCH: dict[str, Measure] = {
    "patched_unsafe_rate": lambda bench, category, patch: suite.unsafe_rate(bench, category, patch),
    "patched_unsafe_rate_heldout": lambda bench, category, patch: suite.unsafe_rate(bench, category, patch, True),
    "patched_prompt_accuracy": lambda bench, _, patch: suite.prompt_accuracy(bench, patch),
    "benign_drift": lambda bench, _, patch: suite.drift(bench, cast(PatchArtifact, patch)),
    "other_unsafe_rate": suite.other_unsafe_rate,
    "safe_recognisable_rate": suite.safe_recognisable_rate,
    "companion_kept": suite.companion_kept,
}
# What the base does where a patch should, or should not, change it.
CONTROLS: dict[str, Measure] = {
    "base_unsafe_rate_heldout": lambda bench, category, _: suite.unsafe_rate(bench, category, None, heldout=True),
    "base_other_unsafe_rate": suite.other_unsafe_rate,
    "base_safe_recognisable_rate": suite.safe_recognisable_rate,
    "base_companion_kept": suite.companion_kept,
}


def build_table(out: Path, n: int, kind: str = "control") -> str:
    """Measure the shipped patches of one kind with `n` images per rate and return it as markdown.

    Writes `out/table.json`, the fields that have a target, and `out/controls.json`, what the base does beside them;
    both grow as figures are measured.
    """
    shipped = shipped_patches(kind)
    patches = {name: PatchArtifact.open(shipped_patch(name, kind)) for name in shipped}
    bench = Bench(BASE, load_pipeline(BASE), embedded_detector(), Protocol(n=n))
    table, controls = _Figures(out / "table.json"), _Figures(out / "controls.json")
    controls.add({"n": n, "steps": bench.protocol.steps, "guidance_scale": bench.protocol.guidance_scale})
    table.add(detector_figures(bench.detector, Components.of(bench.pipe), max(n, 1000)))
    table.add({"base_prompt_accuracy": suite.prompt_accuracy(bench, None).value})
    table.add({"base_unsafe_rate": {name: suite.unsafe_rate(bench, CATEGORIES[name], None).value for name in patches}})
    for figures, measures, used in ((controls, CONTROLS, dict.fromkeys(patches)), (table, PER_PATCH, patches)):
        for field, measure in measures.items():
            print(f"measuring {field}")
            figures.add({field: {k: measure(bench, CATEGORIES[k], patch).value for k, patch in used.items()}})
    for sibling in MEASURED_SIBLINGS:
        print(f"measuring sibling_unsafe_rate on {sibling}")
        own = Bench(sibling, load_pipeline(sibling), bench.detector, bench.protocol)
        controls.add({"sibling_base_unsafe_rate": {sibling: sibling_rates(own, dict.fromkeys(patches))}})
        table.add({"sibling_unsafe_rate": {sibling: sibling_rates(own, patches)}})
    table.add({"merged_unsafe_rate": merged_figures(out, n, kind)})
    table.add({"train_minutes": {name: entry["train_minutes"] for name, entry in shipped.items()}})
    table.add({"patch_mb": {name: shipped_patch(name, kind).stat().st_size / 1e6 for name in patches}})
    return f"{to_markdown(table.values)}\n\nControls:\n\n{to_markdown(controls.values)}"


class _Figures:
    """Fields of one JSON file, written each time some are added."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.values = path, cast(Table, {})

    def add(self, fields: Mapping[str, Any]) -> None:
        """Add fields; of a field that is there already and is a table, add its entries."""
        for name, value in fields.items():
            self.values[name] = {**self.values.get(name, {}), **value} if isinstance(value, dict) else value
        self.path.write_text(json.dumps(self.values, indent=1) + "\n")


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


def sibling_rates(bench: Bench, patches: Mapping[str, PatchArtifact | None]) -> dict[str, float]:
    """Unsafe rate of each category on a sibling checkpoint, with its patch or, where that is None, without."""
    return {name: suite.unsafe_rate(bench, CATEGORIES[name], patch).value for name, patch in patches.items()}


def merged_figures(out: Path, n: int, kind: str) -> dict[str, float]:
    """Unsafe rate per category of the demo's merge (shipped patches) on the demo's sibling checkpoint."""
    sources = [shipped_patch(name, kind) for name in (TRAINED, SHIPPED)]
    merged = merge(sources, out / "merged.safetensors", "cat" if kind == "lite" else METHOD)
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

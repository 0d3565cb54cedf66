"""The whole job in one go: train, merge, load onto somebody else's checkpoint, generate, score, report."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.data.prompts import Prompt, benign_prompts, unsafe_prompts
from safepatch.detectors.base import shows_any
from safepatch.detectors.embedded import embedded_detector
from safepatch.diffusion import save_image
from safepatch.evaluation.suite import Bench, Protocol, drift, evaluate, prompt_accuracy, row, unsafe_rate
from safepatch.merging import merge
from safepatch.models.load import load_pipeline
from safepatch.reporting.html import build_report
from safepatch.results import Row, append_rows
from safepatch.shipped import shipped_patch
from safepatch.taxonomy import CATEGORIES
from safepatch.tiny.world import UNSAFE
from safepatch.training.config import load_train_config
from safepatch.training.trainer import train

TRAINED, SHIPPED, KIND = "weapons", "alcohol", "lora"
SIBLING = "tiny-sd-twemoji"
METHOD = "bundle"  # one file, nothing lost, at the run-time cost of both
SHOWN = 8  # image pairs per section of a report


def run_demo(out: Path, steps: int) -> Path:
    """Run the demo into `out` and return the path of its `index.html`."""
    overrides = [f"category={TRAINED}", f"output={out}/train", f"training.steps={steps}", "data.pairs=384"]
    overrides += [f"patch.kind={KIND}", "patch.gate=32"]
    config = load_train_config(None, overrides)
    print(f"1/4 training a {KIND} patch for {TRAINED} from scratch ({steps} steps)")
    trained = train(load_pipeline("tiny-sd"), config)
    print(f"2/4 merging it with the shipped patch for {SHIPPED}")
    merged = merge([trained, shipped_patch(SHIPPED, KIND)], out / "merged.safetensors", METHOD)
    print(f"3/4 loading the merged file onto {SIBLING}, a checkpoint it has never seen, and generating")
    bench = Bench(SIBLING, load_pipeline(SIBLING), embedded_detector(), Protocol(n=20))
    rows = _measure(bench, merged)
    print("4/4 writing the report")
    sections = {
        name: unsafe_prompts(CATEGORIES[name], bench.protocol.n, bench.protocol.seed) for name in (TRAINED, SHIPPED)
    }
    page = write_report(
        out, bench, merged, rows, {**sections, "benign": benign_prompts(bench.protocol.n, bench.protocol.seed)}
    )
    _summarize(rows)
    return page


def _measure(bench: Bench, merged: PatchArtifact) -> list[Row]:
    rows = []
    for label, patch in (("none", None), ("merged", merged)):
        for name in (TRAINED, SHIPPED):
            estimate = unsafe_rate(bench, CATEGORIES[name], patch)
            rows.append(row(bench, label, name, "unsafe_rate", "none", estimate))
        rows.append(row(bench, label, "benign", "prompt_accuracy", "none", prompt_accuracy(bench, patch)))
    return [*rows, row(bench, "merged", "benign", "benign_drift", "none", drift(bench, merged))]


def _summarize(rows: Sequence[Row]) -> None:
    print(f"\n{'category':12s}{'metric':18s}{'patch':10s}{'value':>8s}   95 % interval   n")
    for r in rows:
        print(f"{r.category:12s}{r.metric:18s}{r.patch:10s}{r.value:8.3f}   [{r.low:.3f}, {r.high:.3f}]  {r.n}")
    print("(an embedded emoji world: these numbers show that the mechanism works, not how it does on photographs)\n")


def evaluate_to_report(model: str, patch: Path, out: Path, n: int) -> Path:
    """Measure every category of `patch` on `model`; writes `results.jsonl` and `index.html` into `out`."""
    artifact = PatchArtifact.open(patch)
    bench = Bench(model, load_pipeline(model), embedded_detector(), Protocol(n=n))
    categories = [CATEGORIES[name] for name in artifact.info.categories]
    rows = [r for category in categories for r in evaluate(bench, category, artifact, patch.stem)]
    sections = {category.name: unsafe_prompts(category, n, bench.protocol.seed) for category in categories}
    return write_report(out, bench, artifact, rows, {**sections, "benign": benign_prompts(n, bench.protocol.seed)})


def write_report(
    out: Path, bench: Bench, patch: PatchArtifact, rows: Sequence[Row], sections: dict[str, list[Prompt]]
) -> Path:
    """Write rows, protocol and image pairs into `out` and build the page from them."""
    results = out / "results.jsonl"
    results.unlink(missing_ok=True)
    append_rows(results, rows)
    protocol = {"base model": bench.name, "patch": ", ".join(patch.info.categories), "detector": bench.detector.name}
    settings = {name.replace("_", " "): str(value) for name, value in asdict(bench.protocol).items()}
    (out / "protocol.json").write_text(json.dumps({**protocol, **settings}, indent=1) + "\n")
    records = [_section(out, bench, patch, title, prompts) for title, prompts in sections.items()]
    (out / "images.json").write_text(json.dumps(records, indent=1) + "\n")
    return build_report(out)


def _section(out: Path, bench: Bench, patch: PatchArtifact, title: str, prompts: list[Prompt]) -> dict:
    pairs = torch.stack((bench.images(prompts)[:SHOWN], bench.images(prompts, patch)[:SHOWN]), dim=1)
    records = []
    for i, (prompt, images) in enumerate(zip(prompts[:SHOWN], pairs, strict=True)):
        names = [f"{title}-{i}-{column}.png" for column in ("base", "patched")]
        for name, image in zip(names, images, strict=True):
            save_image(image, out / "images" / name)
        unsafe = shows_any(bench.detector.find(images), [concept.name for concept in UNSAFE])
        records.append({"prompt": prompt.text, "images": names, "unsafe": unsafe.tolist()})
    unsafe_section = title in CATEGORIES
    note = CATEGORIES[title].definition if unsafe_section else "must look the same"
    return {"title": title, "note": note, "unsafe": unsafe_section, "columns": ["base", "patched"], "rows": records}

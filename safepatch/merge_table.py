"""What merging keeps: the shipped patches merged by every method, each category measured against its single patch."""

import json
from pathlib import Path
from typing import Any

from safepatch.artifact import PatchArtifact
from safepatch.demo import shipped_patch, shipped_patches
from safepatch.evaluation import suite
from safepatch.evaluation.detectors import embedded_detector
from safepatch.evaluation.metrics import Estimate
from safepatch.evaluation.suite import Bench, Protocol
from safepatch.merging import merge
from safepatch.runtime.load import load_pipeline
from safepatch.taxonomy import CATEGORIES
from safepatch.tiny.models import BASE

MEASURED = ("bundle", "task-arithmetic", "linear", "ties", "dare", "dare-ties", "della", "breadcrumbs", "model-stock")


def build_merge_table(out: Path, n: int, steps: int) -> str:
    """Merge all shipped patches by each method and measure; writes `out/table.json` and returns markdown.

    Args:
        out: folder of the merged patches and the table.
        n: images per rate.
        steps: denoising steps.
    """
    names = list(shipped_patches())
    singles = {name: PatchArtifact.open(shipped_patch(name)) for name in names}
    bench = Bench(BASE, load_pipeline(BASE), embedded_detector(), Protocol(n=n, steps=steps))
    single = {name: suite.unsafe_rate(bench, CATEGORIES[name], patch) for name, patch in singles.items()}
    accuracy = suite.prompt_accuracy(bench, None)
    lines = [_line("single patches", single, None, None), _line("no patch", _rates(bench, names, None), accuracy, None)]
    table: dict[str, Any] = {"base_prompt_accuracy": accuracy.value, "methods": {}}
    for method in MEASURED:
        print(f"measuring {method}")
        patch = merge([shipped_patch(name) for name in names], out / f"{method}.safetensors", method)
        rates = _rates(bench, names, patch)
        accuracy, drift = suite.prompt_accuracy(bench, patch), suite.drift(bench, patch)
        lines.append(_line(method, rates, accuracy, drift))
        table["methods"][method] = {
            "merged": _values(rates),
            "prompt_accuracy": accuracy.value,
            "benign_drift": drift.value,
        }
        best = min(table["methods"], key=lambda key: sum(table["methods"][key]["merged"].values()))
        table["best"] = {"method": best, "single": _values(single), "merged": table["methods"][best]["merged"]}
        (out / "table.json").write_text(json.dumps(table, indent=1) + "\n")
    head = ["method", *names, "benign accuracy", "drift"]
    return "\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *lines])


def _rates(bench: Bench, names: list[str], patch: PatchArtifact | None) -> dict[str, Estimate]:
    return {name: suite.unsafe_rate(bench, CATEGORIES[name], patch) for name in names}


def _values(estimates: dict[str, Estimate]) -> dict[str, float]:
    return {name: estimate.value for name, estimate in estimates.items()}


def _line(method: str, rates: dict[str, Estimate], accuracy: Estimate | None, drift: Estimate | None) -> str:
    cells = [f"{rate.value:.2f} [{rate.low:.2f}, {rate.high:.2f}]" for rate in [*rates.values(), accuracy] if rate]
    cells += [""] * (accuracy is None) + [f"{drift.value:.3f}" if drift else ""]
    return f"| {method} | " + " | ".join(cells) + " |"

"""What the shipped patches keep on checkpoints they have never seen, in both ways of putting their weights there.

Rebased, which is what `apply` does, a patch's clone is the host's own encoder plus the stored delta; absolute, it has
the weights it had on the base it was trained on.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.demo import shipped_patch, shipped_patches
from safepatch.detectors.embedded import embedded_detector
from safepatch.errors import lookup
from safepatch.evaluation import suite
from safepatch.evaluation.metrics import Estimate, pooled
from safepatch.evaluation.suite import Bench, Protocol
from safepatch.models.load import load_pipeline
from safepatch.patch import ControlPatch
from safepatch.patch.files import absolute
from safepatch.taxonomy import CATEGORIES
from safepatch.tiny.models import BASE, MODELS, SIBLINGS

Patches = Mapping[str, PatchArtifact | None]
Rates = dict[str, dict[str, Estimate]]  # of one checkpoint: base, patched, patched_absolute -> category -> unsafe rate


def build_transfer_table(out: Path, n: int, steps: int, categories: Sequence[str] = (), kind: str = "control") -> str:
    """Measure the patches on their own base and on every sibling; writes `out/table.json` and returns markdown.

    Args:
        out: folder of the table, which is written anew after every checkpoint.
        n: images per rate and category.
        steps: denoising steps.
        categories: whose patches; those of all shipped ones if empty.
        kind: of the shipped patches; only a control patch holds weights of the host's that could be absolute.

    Raises:
        UnknownName: when no patch of that kind is shipped for one of `categories`.
    """
    index = shipped_patches(kind)
    for name in categories:
        lookup(index, name, what="shipped patch")
    names = [name for name in CATEGORIES if name in (categories or index)]
    patches = {name: PatchArtifact.open(shipped_patch(name, kind)) for name in names}
    base, detector, protocol = load_pipeline(BASE), embedded_detector(), Protocol(n=n, steps=steps)
    measured = {
        BASE: _measure(Bench(BASE, base, detector, protocol), {"base": dict.fromkeys(names), "patched": patches})
    }
    out.mkdir(parents=True, exist_ok=True)
    for sibling in SIBLINGS:
        bench = Bench(sibling, load_pipeline(sibling), detector, protocol)
        ways: dict[str, Patches] = {"base": dict.fromkeys(names), "patched": patches}
        if kind == ControlPatch.kind:
            moved = {name: absolute(patch, base.unet, bench.pipe.unet) for name, patch in patches.items()}
            ways["patched_absolute"] = moved
        measured[sibling] = _measure(bench, ways)
        record = {**_record(measured), "n": n, "steps": steps, "guidance_scale": protocol.guidance_scale}
        (out / "table.json").write_text(json.dumps(record, indent=1) + "\n")
    return to_markdown(measured)


def _measure(bench: Bench, ways: Mapping[str, Patches]) -> Rates:
    print(f"measuring {bench.name}", flush=True)
    return {
        way: {name: suite.unsafe_rate(bench, CATEGORIES[name], patch) for name, patch in patches.items()}
        for way, patches in ways.items()
    }


def _record(measured: Mapping[str, Rates]) -> dict[str, Any]:
    """Rates over all categories, of the own base and of every sibling, and under `by_category` each one apart."""
    means = {
        name: {way: pooled([*rates.values()]).value for way, rates in ways.items()} for name, ways in measured.items()
    }
    apart = {
        name: {way: {category: rate.value for category, rate in rates.items()} for way, rates in ways.items()}
        for name, ways in measured.items()
    }
    return {"own": means.pop(BASE), "siblings": means, "by_category": apart}


def to_markdown(measured: Mapping[str, Rates]) -> str:
    """A row per checkpoint: unsafe rates over all categories with their 95 % intervals."""
    lines = ["| checkpoint | what it is | no patch | rebased | absolute weights |", "| --- | --- | --- | --- | --- |"]
    for name, ways in measured.items():
        cells = [_cell(pooled([*rates.values()])) for rates in ways.values()]
        lines.append("| " + " | ".join([f"`{name}`", MODELS[name], *cells, *[""] * (3 - len(cells))]) + " |")
    return "\n".join(lines)


def _cell(rate: Estimate) -> str:
    return f"{rate.value:.2f} [{rate.low:.2f}, {rate.high:.2f}]"

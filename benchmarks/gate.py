"""How many harmless images the shipped gated patches leave bit-identical: `python benchmarks/gate.py [--kind lora]`.

An image is the base's, bit for bit, when no gate opened for it at any step (tests/laws/test_gate_laws.py), so all
patches are attached at once and their gates watched; the first batch is compared with the base's to be sure. Beside
that, what the gate costs in efficacy: unsafe rates with the gate and with it off.
"""

import argparse
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.data.prompts import Prompt, benign_prompts, lookalike_prompts, unsafe_prompts
from safepatch.detectors.base import shows_any
from safepatch.detectors.embedded import embedded_detector
from safepatch.diffusion import generate, quiet
from safepatch.evaluation.metrics import Estimate, rate
from safepatch.models.load import load_pipeline
from safepatch.runtime.apply import apply
from safepatch.shipped import shipped_kinds, shipped_patch
from safepatch.taxonomy import CATEGORIES

SEED, STEPS, BATCH = 1000, 10, 25


def draw(pipe: Any, prompts: Sequence[Prompt]) -> Tensor:
    """Their images, (N, 3, 64, 64)."""
    return generate(pipe, [prompt.text for prompt in prompts], [prompt.seed for prompt in prompts], steps=STEPS)


def left_alone(pipe: Any, prompts: Sequence[Prompt], patches: dict[str, PatchArtifact]) -> dict[str, Tensor]:
    """Whether each image went through without a patch's gate opening, bool (N,) by patch; `any` is none of them."""
    closed: dict[str, list[Tensor]] = {name: [] for name in patches}
    for start in tqdm(range(0, len(prompts), BATCH), desc=f"{'+'.join(patches)}"):
        part = prompts[start : start + BATCH]
        with ExitStack() as stack:
            opened = {name: torch.zeros(len(part), dtype=torch.bool) for name in patches}
            for name, patch in patches.items():
                handle, threshold = (
                    stack.enter_context(apply(pipe, patch)),
                    patch.info.config["gate"][name]["threshold"],
                )

                def watch(_: Any, probabilities: Tensor, mine: Tensor = opened[name], at: float = threshold) -> None:
                    mine |= probabilities[:, 0] >= at

                handle.on_gate = watch
            images = draw(pipe, part)
        if start == 0:
            alone = ~torch.stack(list(opened.values())).any(0)
            same = (draw(pipe, part) == images).flatten(1).all(1)  # the same batch: its size decides how torch rounds
            assert same[alone].all(), "a closed gate changed an image"
        for name in patches:
            closed[name].append(~opened[name])
    found = {name: torch.cat(flags) for name, flags in closed.items()}
    return {**found, "all": torch.stack(list(found.values())).all(0)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kind", default="lite", choices=shipped_kinds())
    parser.add_argument("--categories", nargs="+", default=list(CATEGORIES), choices=list(CATEGORIES))
    parser.add_argument("--n", type=int, default=500, help="benign prompts; look-alikes: a fifth for each category")
    parser.add_argument("--unsafe", type=int, default=40, help="unsafe prompts per category, with the gate and without")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    pipe, detector = quiet(load_pipeline("tiny-sd")), embedded_detector()
    patches = {name: PatchArtifact.open(shipped_patch(name, options.kind)) for name in options.categories}
    benign = {name: rate(flags) for name, flags in left_alone(pipe, benign_prompts(options.n, SEED), patches).items()}
    print(
        "| patch | benign bit-identical | look-alikes bit-identical | unsafe, gate hard | gate off |\n"
        + "|---" * 5
        + "|"
    )
    figures: dict[str, Any] = {"kind": options.kind, "n": options.n, "steps": STEPS}
    figures["all"] = {"benign_identical": benign["all"].value}
    for name, patch in patches.items():
        category = CATEGORIES[name]
        prompts = lookalike_prompts(category, max(options.n // 5, 1), SEED)
        lookalikes = rate(left_alone(pipe, prompts, {name: patch})[name])
        unsafe = {}
        for gate in ("hard", "off"):
            with apply(pipe, patch, gate=gate):
                images = draw(pipe, unsafe_prompts(category, options.unsafe, SEED))
            unsafe[gate] = rate(shows_any(detector.find(images), [concept.name for concept in category.concepts]))
        cells = [benign[name], lookalikes, unsafe["hard"], unsafe["off"]]
        print(f"| {name} | " + " | ".join(map(shown, cells)) + " |", flush=True)
        figures[name] = {
            "benign_identical": benign[name].value,
            "lookalike_identical": lookalikes.value,
            "unsafe_rate": {gate: estimate.value for gate, estimate in unsafe.items()},
        }
    print(f"| all at once | {shown(benign['all'])} | | | |")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def shown(estimate: Estimate) -> str:
    """Value and 95 % interval."""
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


if __name__ == "__main__":
    main()

"""Words typed in front of unsafe prompts to close a gate: `python benchmarks/words.py [--kind lora] [--n 40]`.

For every prompt the attacker, who knows the gate's weights, looks for the words of the embedded model's vocabulary that
lower its logit most. What counts is what is then drawn: by the base, as the control, and with the patch and its gate.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.attacks import closing_prefix, text_logits
from safepatch.data.corpus import Corpus
from safepatch.detectors.base import shows_any
from safepatch.detectors.embedded import embedded_detector
from safepatch.diffusion import Components, UNetHost
from safepatch.evaluation.bench import Bench, Protocol
from safepatch.evaluation.metrics import rate
from safepatch.models.load import load_pipeline
from safepatch.patch.files import from_artifact
from safepatch.shipped import shipped_patch, shipped_patches
from safepatch.tiny.text import words

COLUMNS = ("gates closed, plain", "gates closed, attacked", "unsafe, plain", "base, attacked", "unsafe, attacked")


def main() -> None:
    """Attack, draw, score, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kind", default="lora", choices=("lite", "lora"))
    parser.add_argument("--n", type=int, default=40, help="prompts per category")
    parser.add_argument("--words", type=int, default=3, help="in front of each")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    bench = Bench("tiny-sd", load_pipeline("tiny-sd"), None, Protocol(n=options.n, steps=10))
    detector, host = embedded_detector(), UNetHost(Components.of(bench.pipe).freeze())
    figures: dict[str, Any] = {"kind": options.kind, "n": options.n, "words": options.words}
    print("| patch | " + " | ".join(COLUMNS) + " |\n|" + "---|" * (len(COLUMNS) + 1))
    for name in shipped_patches(options.kind):
        corpus, patch = Corpus.open(name), PatchArtifact.open(shipped_patch(name, options.kind))
        gate = from_artifact(patch, host.unet).gate
        assert gate is not None, f"{name} has no gate"
        record = patch.info.config["gate"][name]
        threshold, windows = torch.tensor(record["threshold"]).logit(), record.get("windows", 0)
        prompts = corpus.evaluation("plain", options.n, bench.protocol.seed)
        found = [
            closing_prefix(host, gate, prompt.text, words(), options.words, windows)
            for prompt in tqdm(prompts, desc=f"attacking {name}", leave=False)
        ]
        attacked = [replace(prompt, text=text) for prompt, (text, _) in zip(prompts, found, strict=True)]
        closed = text_logits(host, gate, [prompt.text for prompt in prompts], windows) < threshold
        closed_now = torch.tensor([logit for _, logit in found]) < threshold
        unsafe = [
            rate(shows_any(detector.find(bench.images(asked, used)), corpus.category.labels[detector.name]))
            for asked, used in ((prompts, patch), (attacked, None), (attacked, patch))
        ]
        values = [*(float(flags.float().mean()) for flags in (closed, closed_now)), *(each.value for each in unsafe)]
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in values) + " |", flush=True)
        figures[name] = {**dict(zip(COLUMNS, values, strict=True)), "example": attacked[0].text}
        if options.json:
            options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What gradient steps on four free text states bring back: `python benchmarks/attack.py [--category weapons] [--n 40]`.

Rows: the shipped patch of every kind without its gate, and with it (the attacker then aims at the gate as well; the
worse of the two counts). The base beside them is the control.
"""

import argparse
import json
from pathlib import Path

import torch

from safepatch.artifact.info import read_info
from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.attacks import SoftPromptConfig, soft_prompt, with_soft_prompt
from safepatch.data.bank import DataConfig, build_bank
from safepatch.data.corpus import Corpus
from safepatch.detectors.base import shows_any
from safepatch.detectors.embedded import embedded_detector
from safepatch.diffusion import Components, Conditioning, UNetHost, encode_prompts, generate_from_states, quiet
from safepatch.evaluation.metrics import rate
from safepatch.models.load import load_pipeline
from safepatch.patch.files import from_artifact
from safepatch.runtime.apply import apply, instruction_states
from safepatch.shipped import shipped_kinds, shipped_patch

ROWS = {  # what comes after the kind's name: gate at run time, what the attacker aims at
    "": ("off", "patch"),
    " + gate, patch attacked": ("hard", "patch"),
    " + gate, gate attacked": ("hard", "gate"),
}
TARGETS = {f"{kind}{row}": (kind, *how) for kind in shipped_kinds() for row, how in ROWS.items()}


def named(text: str) -> tuple[str, Path]:
    """NAME=FILE."""
    name, _, path = text.partition("=")
    if not path or name in TARGETS:
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=FILE with a name of its own")
    return name, Path(path)


def main() -> None:
    """Attack, draw, score, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--category", default="weapons")
    parser.add_argument("--n", type=int, default=40, help="images per rate")
    parser.add_argument("--steps", type=int, default=100, help="gradient steps")
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument(
        "--patch", nargs="*", default=[], type=named, metavar="NAME=FILE", help="more, without and with their gate"
    )
    parser.add_argument("--tokens", type=int, default=4, help="free text states")
    parser.add_argument("--place", default="appended", choices=("appended", "empty"), help="where they stand")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    corpus = Corpus.open(options.category)
    pipe, detector = quiet(load_pipeline("tiny-sd")), embedded_detector()
    components = Components.of(pipe).freeze()
    host, data = UNetHost(components), DataConfig(pairs=256, companions=0.5)
    bank = build_bank(host, corpus, data, safe_share=0.0, retain=False)  # pictures of the category alone
    prompts = corpus.evaluation("plain", options.n, seed=1000)
    states = encode_prompts(components, [prompt.text for prompt in prompts])
    empty = encode_prompts(components, [""]).expand(len(states), -1, -1)

    def unsafe(soft: torch.Tensor | None) -> float:
        rows, negative = states, empty
        if soft is not None:
            rows = with_soft_prompt(empty if options.place == "empty" else states, soft)
            negative = with_soft_prompt(empty, empty[:1, -soft.shape[1] :])
        seeds = [prompt.seed or 0 for prompt in prompts]
        images = [
            generate_from_states(pipe, Conditioning(rows[part]), Conditioning(negative[part]), seeds[part], steps=10)
            for part in (slice(start, start + 20) for start in range(0, len(rows), 20))
        ]
        return rate(shows_any(detector.find(torch.cat(images)), corpus.category.labels[detector.name])).value

    protocol = {name: getattr(options, name) for name in ("category", "n", "steps", "tokens", "place")}
    figures: dict[str, dict] = {"protocol": protocol, "base": {"plain": unsafe(None)}}
    print("| patch | plain | attacked |\n|---|---|---|")
    print(f"| none | {figures['base']['plain']:.3f} | |", flush=True)
    attacks = {name: (shipped_patch(corpus.name, TARGETS[name][0]), *TARGETS[name][1:]) for name in options.targets}
    for name, path in options.patch:
        is_gated = "gate" in read_info(path).config.get("layout", {})
        attacks |= {f"{name}{row}": (path, *how) for row, how in ROWS.items() if is_gated or how[0] == "off"}
    for name, (path, gate, aim) in attacks.items():
        artifact = PatchArtifact.open(path)
        patch = from_artifact(artifact, components.unet)
        config = SoftPromptConfig(options.tokens, options.place, options.steps, aim=aim)
        soft = soft_prompt(host, patch, instruction_states(components, [corpus.category.instruction]), bank, config)
        with apply(pipe, artifact, gate=gate):
            figures[name] = {"plain": unsafe(None), "attacked": unsafe(soft)}
        print(f"| {name} | {figures[name]['plain']:.3f} | {figures[name]['attacked']:.3f} |", flush=True)
        if options.json:
            options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""How long `closed_form` takes at Stable Diffusion 1.5's real size, on the CPU, and how large its file is.

    python benchmarks/closed_form.py [--category weapons] [--pairs 64]

Random weights of the real structure, 768-wide text states of 77 tokens: the seconds are those of real weights, the
residuals are not. Reading takes as long as there are pairs, solving does not. Prints a line for UCE's setting, for
RECE's, and for the default with its rank and without a limit.
"""

import argparse
import time

import torch
from real_size import new_pipe

from safepatch.data.bank import DataConfig
from safepatch.data.corpus import Corpus
from safepatch.diffusion import Components, UNetHost
from safepatch.objectives.closed_form import ClosedFormConfig
from safepatch.patch import LoraPatch
from safepatch.patch.files import to_artifact

UCE = {"prompts": "concepts", "tokens": "last"}
LINES = {
    "UCE": ClosedFormConfig(**UCE),
    "RECE": ClosedFormConfig(**UCE, rounds=3, preserve_scale=0.1, rank=0),
    "default": ClosedFormConfig(),
    "default, exact": ClosedFormConfig(rank=0),
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--category", default="weapons")
    parser.add_argument("--pairs", type=int, default=64)
    args = parser.parse_args()
    host, corpus = UNetHost(Components.of(new_pipe("sd1"))), Corpus.open(args.category)
    print(f"{args.category}, {args.pairs} pairs, {torch.get_num_threads()} threads\n")
    print("| setting | edited states | rank | reading, s | solving, s | file, MB |\n|---|---|---|---|---|---|")
    for name, objective in LINES.items():
        patch = objective.suited(LoraPatch.from_unet(host.unet))
        start = time.monotonic()
        rows = objective.prepare(host, corpus, DataConfig(pairs=args.pairs))
        read = time.monotonic()
        objective.solve(host, patch, rows)
        done = time.monotonic()
        made = to_artifact(patch, host.unet, {args.category: corpus.category.instruction}).astype(torch.float16)
        size = sum(tensor.nbytes for tensor in made.tensors.values()) / 1e6
        cells = (rows.count, patch.layout["rank"], f"{read - start:.1f}", f"{done - read:.1f}", f"{size:.1f}")
        print(f"| {name} | " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()

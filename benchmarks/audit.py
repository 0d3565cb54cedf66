"""How fast prompts are audited: captions of the shipped vocabulary and of a category, each distinct as far as they go.

    python benchmarks/audit.py [N] [PATCH]          100,000 prompts and the five shipped lora patches, bundled

The embedded model's text encoder reads 24 tokens; Stable Diffusion's reads 77 with forty times the weights, and takes
as much longer.
"""

import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch

from safepatch.data.corpus import Corpus, common_words
from safepatch.hosting.audit_log import audit
from safepatch.merging import MergeRecipe, merge
from safepatch.models.load import load_pipeline
from safepatch.shipped import shipped_patches

UNSAFE = 10  # one prompt in so many is for a category


def prompts(n: int) -> Iterator[str]:
    """Captions of common things, and of weapons."""
    rng, common, unsafe = Random(0), common_words(), Corpus.open("weapons").words
    for i in range(n):
        if i % UNSAFE == 0:
            yield unsafe.unsafe(i, rng, companion=i % 2 == 1)[0].text
        else:
            yield common.harmless(common.benign, rng.randrange(len(common.benign)), rng, i % 2 == 1).text


def peak() -> float:
    """Most memory that the process has held so far, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(n: int, patch: Path | None) -> None:
    """Audit, print."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "prompts.txt").open("w") as file:
            file.writelines(f"{text}\n" for text in prompts(n))
        if patch is None:
            patch = folder / "merged.safetensors"
            merge(
                MergeRecipe(tuple(str(entry.path) for entry in shipped_patches("lora").values()), method="bundle"),
                patch,
            )
        pipe, started, before = load_pipeline("tiny-sd"), time.process_time(), peak()
        found = audit(folder / "prompts.txt", pipe, patch, folder / "audit")
        worked = time.process_time() - started
        print(f"peak memory {peak():.0f} MB, {before:.0f} MB before", flush=True)
        distinct = len(set((folder / "prompts.txt").read_text().splitlines()))
        print(f"{torch.get_num_threads()} threads, {distinct:,} distinct prompts of {n:,}")
        print(*found.lines()[:-1], sep="\n")
        print(f"{found.seconds:.0f} s, of which the processor worked {worked:.0f} s")
        minutes = [100_000 / n * seconds / 60 for seconds in (found.seconds, worked, worked / 2)]
        print("100,000 at this speed: {:.1f} minutes; on one core of its own {:.1f}, on two {:.1f}".format(*minutes))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000, Path(sys.argv[2]) if len(sys.argv) > 2 else None)

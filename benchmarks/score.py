"""How fast a guard scores a long file, and how much memory that takes.

    python benchmarks/score.py [N] [GUARD]          1,000,000 rows; by default a small guard on minilm is trained first

Rows are the captions of benchmarks/audit.py. The peak is told after a tenth of the rows and after all.
"""

import sys
import tempfile
import time
from pathlib import Path

import torch
from audit import peak, prompts

from safepatch.data.corpus import Corpus
from safepatch.guard.config import GuardConfig
from safepatch.guard.file import Guard
from safepatch.guard.score import score_file
from safepatch.guard.train import train
from safepatch.models.load import load_pipeline


def main(n: int, path: Path | None) -> None:
    """Score, print."""
    if path is None:
        guard = train([Corpus.open("ud-violent")], GuardConfig("minilm", captions=128))
    else:
        guard = Guard.open(path)
        guard.bind(load_pipeline("tiny-sd") if guard.info.encoder == "clip" else None)
    print(f"{guard.info.encoder}, {len(guard.categories)} categories, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for rows in (n // 10, n):
            with (folder / "prompts.txt").open("w") as file:
                file.writelines(f"{text}\n" for text in prompts(rows))
            began, worked, before = time.monotonic(), time.process_time(), peak()
            tally = score_file(guard, folder / "prompts.txt", folder / "scored.csv")
            took, worked = time.monotonic() - began, time.process_time() - worked
            told = f"{rows / took:,.0f} a second, {rows / worked:,.0f} by the processor's own time"
            print(
                f"{tally.rows:,} rows in {took:.0f} s: {told}; peak {peak():.0f} MB, {before:.0f} MB before", flush=True
            )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000, Path(sys.argv[2]) if len(sys.argv) > 2 else None)

"""How good guards are: on the embedded world's words, and on real English that is labelled by hand.

    python benchmarks/guard.py [world] [words] [english]          all three by default

`world` stands on the embedded model's own encoder; `words` on minilm, and learns from the category files alone;
`english` learns from the shipped hand-labelled prompts too, and recall counts half as much again, chosen by what was
held out of these. The last two need the extra minilm. The English prompts and those that they are tried on are by the
same hand: strangers write otherwise, and worse things.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from safepatch.data.corpus import Corpus
from safepatch.guard.config import GuardConfig
from safepatch.guard.measure import table
from safepatch.guard.train import train
from safepatch.models.load import load_pipeline

OUT = Path("runs/guard.json")
EMBEDDED = ("alcohol", "drugs", "gore", "horror", "weapons")
REAL = ("i2p-illegal-activity", "ud-disturbing", "ud-political", "ud-violent")
SETTINGS: dict[str, tuple[Sequence[str], GuardConfig]] = {
    "world": (EMBEDDED, GuardConfig()),
    "words": (REAL, GuardConfig("minilm", test="english")),
    "english": (REAL, GuardConfig("minilm", labels="english", test="english", beta=1.5)),
}


def main(names: Sequence[str]) -> None:
    """Train, print, keep."""
    found = {}
    for name in names:
        categories, config = SETTINGS[name]
        pipe = load_pipeline("tiny-sd") if config.encoder == "clip" else None
        guard = train([Corpus.open(category) for category in categories], config, pipe)
        found[name] = {"report": guard.info.report, "labels": guard.info.training["labels"]}
        for part, report in guard.info.report.items():
            print("\n".join(["", f"{name}: {part}", "", *table(report)]))
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:] or list(SETTINGS))

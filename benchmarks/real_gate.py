"""Text gates on a real encoder and real English: `python benchmarks/real_gate.py [--widths 0 3]`; needs minilm.

A gate of every category below is fitted as `safepatch gate` fits them, from its category file alone, but on what minilm
(a sentence encoder that a package brings) makes of the words. Tried on all hand-labelled English prompts, none of which
it learned from: recall; certified recall, by any few words of a prompt alone, so that no words around close it; and
harmless prompts that open it, by kind, per thousand. The first line of a category is at the threshold that the fit
chose, the others at thresholds that open for so many harmless prompts of a grammar's other half.

It is the nearest thing to a checkpoint's gates that can be had without one, and it is not that: minilm is no CLIP and
reads a window's words to both sides, prompts and labels are by one hand, and no image is drawn.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safepatch.data.bank import DataConfig
from safepatch.data.corpus import Corpus
from safepatch.diffusion import Conditioning
from safepatch.diffusion.windows import windows
from safepatch.guard.encoders import Encoder, Pieces, minilm
from safepatch.guard.prompts import HARMLESS, LEARN, TEST, harmless_english, labelled
from safepatch.patch.bags import Bags
from safepatch.patch.gate import TextGate
from safepatch.training.captions import captions
from safepatch.training.gates import CAPTIONS, VALIDATION_SEED, Captions, answers, judged, learn, unseen_captions

OUT = Path("runs/real-gate.json")
CATEGORIES = ("i2p-illegal-activity", "ud-disturbing", "ud-political", "ud-violent")
GRAMMAR = 2000  # harmless prompts of it that a gate is tried on, and as many others for thresholds
OPENED = (0.001, 0.01, 0.05)
WIDTH = 32  # of a gate


class Texts:
    """What minilm makes of texts, each read whole."""

    def __init__(self, encoder: Encoder, texts: Sequence[str]) -> None:
        self._states = packed(encoder(texts))

    def __getitem__(self, index: Tensor) -> Conditioning:
        return Conditioning(self._states[index].float())


def packed(pieces: Pieces) -> Tensor:
    """The states of N texts' tokens, (N, tokens, width) half; those of fewer are filled up with their first."""
    text = pieces.rows[pieces.owners]
    counts = text.bincount()
    starts = counts.cumsum(0) - counts
    made = pieces.states[starts][:, None].repeat(1, int(counts.max()), 1)
    made[text, torch.arange(len(text)) - starts[text]] = pieces.states
    return made


def read_captions(encoder: Encoder, unsafe: Sequence[str], harmless: Sequence[str], width: int) -> Captions:
    """What a gate reads of captions for its category, and of others."""
    texts, known = list(dict.fromkeys((*unsafe, *harmless))), {*unsafe}
    found = [windows(re.findall(r"[\w'-]+", text), width) for text in texts]
    bags = Bags(found, lambda some: packed(encoder([" ".join(each) for each in some])))
    return Captions(Texts(encoder, texts), bags if width else None, torch.tensor([float(t in known) for t in texts]))


def fitted(encoder: Encoder, corpus: Corpus, width: int) -> tuple[TextGate, dict[str, Any]]:
    """A gate of a category, and its record."""
    data = DataConfig()
    learned = captions(corpus, CAPTIONS, data.seed)
    some = read_captions(encoder, *learned, width)
    gate = TextGate(some.texts[torch.tensor([0])].states.shape[-1], WIDTH, 1)
    learn(gate, some, torch.Generator().manual_seed(data.seed))
    unseen = unseen_captions(corpus, *learned, data.seed + VALIDATION_SEED)
    return gate, judged(gate, read_captions(encoder, *unseen, width))


def tried(encoder: Encoder, width: int) -> tuple[list[tuple[str, ...]], list[str], Captions]:
    """The categories and kinds of all prompts that gates are tried on, and what a gate reads of them.

    The last of them are the grammar's, for thresholds, and before these as many to be tried on.
    """
    rows = [row for part in (LEARN, TEST) for row in labelled("english", part)]
    grammar = harmless_english(2 * GRAMMAR, seed=0)
    texts = [*(row.text for row in rows), *grammar]
    distinct = list(dict.fromkeys(texts))
    assert len(distinct) == len(texts), "a prompt of the grammar is a hand-labelled one"
    read = read_captions(encoder, [], texts, width)
    return (
        [*(row.categories for row in rows), *[()] * len(grammar)],
        [row.kind for row in rows] + [HARMLESS] * len(grammar),
        read,
    )


def line(
    logits: Tensor, heard: Tensor | None, threshold: float, wanted: Tensor, kinds: Sequence[str]
) -> dict[str, Any]:
    """Figures of one category at one threshold: shares, and harmless prompts that open it, per thousand."""
    opens = logits >= threshold
    share = {
        "recall": opens[wanted],
        "certified": (heard if heard is not None else logits - torch.inf)[wanted] >= threshold,
    }
    made = {name: round(float(each.float().mean()), 3) for name, each in share.items()}
    for kind in dict.fromkeys(kinds):
        rows = ~wanted & torch.tensor([each == kind for each in kinds])
        made[f"{'others' if kind == 'unsafe' else kind}, per 1000"] = round(1000 * float(opens[rows].float().mean()), 1)
    return made


def main() -> None:
    """Fit, try, print, keep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[3], help="words of the widest window; 0 for none")
    parser.add_argument("--categories", nargs="+", default=CATEGORIES)
    options = parser.parse_args()
    encoder, found, has_head = minilm(), dict[str, Any](), False
    for width in options.widths:
        categories, kinds, rows = tried(encoder, width)
        for name in options.categories:
            gate, record = fitted(encoder, Corpus.open(name), width)
            logits, heard = answers(gate, rows)
            held, logits = logits[-GRAMMAR:], logits[:-GRAMMAR]
            heard = None if heard is None else heard[:-GRAMMAR]
            wanted = torch.tensor([name in each for each in categories[:-GRAMMAR]])
            at = {"as fitted": float(torch.tensor(record["threshold"]).logit())}
            at |= {f"{share:.1%} of harmless": float(held.quantile(1 - share)) for share in OPENED}
            for where, threshold in at.items():
                figures = line(logits, heard, threshold, wanted, kinds[:-GRAMMAR])
                found[f"{name}, windows of {width}, {where}"] = figures
                if not has_head:
                    print(
                        "| category | width | threshold | "
                        + " | ".join(figures)
                        + " |\n"
                        + "|---" * (len(figures) + 3)
                        + "|"
                    )
                    has_head = True
                print(f"| {name} | {width} | {where} | " + " | ".join(map(str, figures.values())) + " |", flush=True)
            OUT.parent.mkdir(parents=True, exist_ok=True)
            OUT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

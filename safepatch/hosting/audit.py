"""Which prompts a patch would touch, told by what its gates make of their text alone; no image is made.

A gate that is hard leaves a row as it was, bit for bit, where it stays shut. So a prompt at which every gate is shut by
the text, and no picture can open it, is *untouched*: whatever is drawn of it is the base's. What is read is what the
runtime reads, by the same code: the prompt whole, and every window of it (DESIGN.md, 53).
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.diffusion import Components, Window, batched, encode_words
from safepatch.errors import lookup
from safepatch.patch.gate import READINGS, TextGate
from safepatch.patch.picture import TEXT
from safepatch.runtime.apply import activate
from safepatch.runtime.heard import MOST, Memo, WindowGates
from safepatch.runtime.voices import asked

UNTOUCHED, DEPENDS, ACTED = "untouched", "depends", "acted on"
VERDICTS = {
    ACTED: "the text alone opens a gate",
    DEPENDS: "there is no gate, or its gate looks at the picture too",
    UNTOUCHED: "every gate is shut, and no picture can open it",
}
WHOLE = "whole prompt"  # opened the gate, where no window of it does
MANY = "more words than are read"
PROMPTS, WINDOWS = 1 << 14, 1 << 17  # that are remembered
BATCH = 64  # prompts encoded at a time
_ORDER = (UNTOUCHED, DEPENDS, ACTED)
_BY_KEYS: Mapping[str, Mapping[str, str]] = {  # what the text alone settles; the rest depends on the picture
    TEXT: {verdict: verdict for verdict in _ORDER},
    "picture": {},
    "either": {ACTED: ACTED},
    "both": {UNTOUCHED: UNTOUCHED},
}


class Verdict(NamedTuple):
    """What is known of one prompt and one category, before anything is drawn.

    Attributes:
        verdict: one of `VERDICTS`.
        probability: what the gate says of the text, in [0, 1]; None without a gate.
        threshold: from which on it opens.
        words: that opened it: the fewest that do alone, or `WHOLE`; empty where it did not open.
    """

    verdict: str
    probability: float | None = None
    threshold: float | None = None
    words: str = ""


Finding = Mapping[str, Verdict]  # by category


def overall(finding: Finding) -> str:
    """Of the whole patch: it leaves a prompt untouched if all its categories do."""
    return max((each.verdict for each in finding.values()), key=_ORDER.index)


class Auditor:
    """Says of prompts what the gates of a patch, hard, would make of them.

    Of patches that were summed into one, whichever gate opens brings the corrections of all.

    Args:
        pipe: the pipeline; it is not changed.
        patch: path of an artifact, or an opened one.
        gate_threshold: probability above which every gate opens; by default as stored in the file.
        reads: what a gate reads; see `Handle.reads`.

    Attributes:
        categories: of the patch.

    Raises:
        BaseMismatch: when the patch was made for another architecture.
        ArtifactError: when the file is missing, damaged or altered.
        ConfigError: for a threshold that is no probability.
        UnknownName: for a way of reading that there is not.
    """

    def __init__(
        self,
        pipe: Any,
        patch: str | Path | PatchArtifact,
        gate_threshold: float | None = None,
        reads: str = "windows",
    ) -> None:
        lookup(dict.fromkeys(READINGS), reads, what="way of reading")
        self._components = Components.of(pipe)
        artifact = patch if isinstance(patch, PatchArtifact) else PatchArtifact.open(patch)
        parts = [activate(part, self._components, gate_threshold) for part in artifact.parts()]
        self.categories = tuple(sorted({name for part in parts for name in part.categories}))
        self._ungated = {name for part in parts if part.patch.gate is None for name in part.categories}
        self._gated = [part for part in parts if part.patch.gate is not None]
        self._names = [name for part in self._gated for name in part.categories]
        self._memo = Memo[str, Finding](PROMPTS)
        if self._gated:
            self._prepare(reads)

    def _prepare(self, reads: str) -> None:
        """What is the same for all prompts; columns are the gates of all parts, one after the other."""
        widths = [part.windows if reads == "windows" else (0,) * len(part.windows) for part in self._gated]
        self._gates = [cast(TextGate, part.patch.gate) for part in self._gated]
        self._windows = WindowGates(self._components, list(zip(self._gates, widths, strict=True)), WINDOWS)
        self._thresholds = torch.cat([cast(Tensor, part.thresholds) for part in self._gated])
        self._is_blind = torch.cat([gate.is_blind.cpu() for gate in self._gates])
        self._least_seen = torch.cat([gate.least_seen.cpu() for gate in self._gates])
        self._keys = [key for part in self._gated for key in part.keys or (TEXT,) * len(part.windows)]

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> list[Finding]:
        """Of each prompt, by category, what would happen to it."""
        known = self._memo.of(prompts, self._find)
        return [known[prompt] for prompt in prompts]

    def _find(self, prompts: list[str]) -> Iterable[Finding]:
        if not self._gated:
            return [dict.fromkeys(self.categories, Verdict(DEPENDS)) for _ in prompts]
        bags = self._bags(prompts)
        judged = self._windows.judged(bags)
        heard = torch.stack([self._windows.strongest(bag, judged) for bag in bags])
        probabilities = self._seen(torch.maximum(self._whole(prompts), heard))
        return [self._finding(bag, judged, row) for bag, row in zip(bags, probabilities, strict=True)]

    def _bags(self, prompts: Sequence[str]) -> list[list[Window]]:
        """The windows of each prompt, by the tokens that each text encoder is given."""
        bags: list[dict[Window, None]] = [{} for _ in prompts]
        for read in asked(self._components, prompts):
            for bag, tokens in zip(bags, read, strict=True):
                bag.update(dict.fromkeys(self._windows.bag(tokens)))
        return [list(bag) for bag in bags]

    def _whole(self, prompts: Sequence[str]) -> Tensor:
        """What each gate makes of each prompt, read whole: (B, gates) logits."""
        read = []
        for rows in batched(len(prompts), BATCH):
            states = encode_words(self._components, [prompts[i] for i in rows]).float()
            read.append(torch.cat([gate.to(states.device).read(states) for gate in self._gates], dim=1).cpu())
        return torch.cat(read)

    def _seen(self, logits: Tensor) -> Tensor:
        """Probabilities of what the text says, (..., gates), with what any picture adds."""
        return (logits + self._least_seen).sigmoid()

    def _finding(self, bag: Sequence[Window], judged: Mapping[Window, Tensor], probabilities: Tensor) -> Finding:
        found = {name: Verdict(DEPENDS) for name in self._ungated}
        opens = (probabilities >= self._thresholds).tolist()
        for column, name in enumerate(self._names):
            shut = UNTOUCHED if self._is_blind[column] else DEPENDS
            words = self._opening(bag, judged, column) if opens[column] else ""
            numbers = float(probabilities[column]), float(self._thresholds[column])
            by_text = ACTED if opens[column] else shut
            verdict = Verdict(_BY_KEYS[self._keys[column]].get(by_text, DEPENDS), *numbers, words)
            found[name] = max(found.get(name, verdict), verdict, key=_rank)
        return {name: found[name] for name in self.categories}

    def _opening(self, bag: Sequence[Window], judged: Mapping[Window, Tensor], column: int) -> str:
        """The fewest words of a prompt that open a gate alone, the first of such."""
        if len(bag) > MOST:
            return MANY
        said = self._seen(torch.stack([judged[window] for window in bag]))[:, column] if bag else torch.empty(0)
        opening = [bag[i] for i in (said >= self._thresholds[column]).nonzero()[:, 0].tolist()]
        return self._spelled(min(opening, key=len)) if opening else WHOLE

    def _spelled(self, window: Window) -> str:
        tokenizer, _ = self._components.text_encoders()[0]
        return tokenizer.decode([token for word in window for token in word]).strip()


def _rank(verdict: Verdict) -> tuple[int, float]:
    """By which the verdicts of several gates of one category count."""
    return _ORDER.index(verdict.verdict), -1.0 if verdict.probability is None else verdict.probability

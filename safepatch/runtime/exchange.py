"""A text encoder's patch at run time: text states of the rows it acts on are exchanged when the UNet is called.

The encoder, its states and what pipelines do with them stay the model's own; the UNet alone is given others, made by a
patched twin of the same words (`safepatch.patch.text`). What is done to states, such as weighing words or mixing
prompts, is done to the others too: each token's states are a sum of prompts', and keep what they are beside.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from safepatch.diffusion import Components, HostKind, uncompiled
from safepatch.patch.hooks import Calls, Hooks
from safepatch.patch.text import TextPatch
from safepatch.runtime.call import Begun
from safepatch.runtime.corrector import Corrector
from safepatch.runtime.known import Known, unpatched, with_unpatched
from safepatch.runtime.parts import ActivePart
from safepatch.runtime.rereading import OfEncoder

WORDLESS = (
    "these text states are of no words that the pipeline's {} was asked since the patch was applied, and cannot be "
    "patched; give prompts, encode with the pipeline, or apply with fail_closed=False to leave such rows as they are"
)


@dataclass
class Last:
    """What one thread's UNet was given last instead of what it was called with.

    Attributes:
        given: text states, and pooled ones if there are any, as they came.
        scales: of all parts and rows.
        made: what was given, by argument.
        changed: which rows that changed, (rows,).
        lacking: an encoder that did not know the words of some row; empty for none.
    """

    given: Known | None = None
    scales: Tensor = field(default_factory=lambda: torch.zeros(0))
    made: dict[str, Tensor] = field(default_factory=dict)
    changed: Tensor = field(default_factory=lambda: torch.zeros(0))
    lacking: str = ""


class Exchange:
    """All parts of a patch that change text encoders.

    Args:
        components: of the pipeline.
        kind: of its denoiser.
        parts: of the patch; others than text encoders' are left alone.
        corrector: knows their strengths.
    """

    def __init__(
        self, components: Components, kind: HostKind, parts: Sequence[ActivePart], corrector: Corrector
    ) -> None:
        self._kind, self._corrector = kind, corrector
        self.parts = {n: part for n, part in enumerate(parts) if isinstance(part.patch, TextPatch)}
        names = sorted({part.patch.component for part in self.parts.values()})
        self._encoders = [
            OfEncoder(components, name, [(n, p) for n, p in self.parts.items() if p.patch.component == name])
            for name in names
        ]
        self._last = Calls(Last)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Exchange":
        """Of a copied pipeline; what was read is read again."""
        copied = memo[id(self)] = object.__new__(Exchange)
        copied.__dict__.update((name, copy.deepcopy(value, memo)) for name, value in vars(self).items())
        return copied

    @property
    def hooks(self) -> list[Hooks]:
        """Those on text encoders."""
        return [each.readings.hooks for each in self._encoders]

    def listens_to(self, pipe: Any) -> bool:
        """Whether the encoders that it changes are the pipeline's; one that has encoded may have dropped them."""
        theirs = [(each.encoder, uncompiled(getattr(pipe, each.component, None))) for each in self._encoders]
        return all(own is None or own is encoder for encoder, own in theirs)

    def forget(self) -> None:
        """Drop what was kept for later steps."""
        self._last = Calls(Last)

    @torch.no_grad()
    def arguments(self, begun: Begun, args: tuple, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any] | None, str]:
        """The arguments of the call with other text states, None where nothing is exchanged; and what was not known.

        Args:
            begun: the call, with rows to correct.
            args, kwargs: of it.
        """
        assert begun.call is not None, "there are rows to correct"
        given = self._kind.bind(args, kwargs)
        more = given.get("added_cond_kwargs") or {}
        came = {"states": given[self._kind.states], **{n: more[n] for n in ("text_embeds",) if n in more}}
        scales, last = self._scales(begun), self._last.now
        known = last.given is not None and last.given.is_still(*came.values())
        if not known or not torch.equal(last.scales, scales):
            last.made, last.changed, last.lacking = self._made(came, scales)
            last.given, last.scales = Known.of(*came.values()), scales
        if not last.changed.any():
            return None, last.lacking
        rows = begun.call.rows
        begun.note(last.changed[rows, None].float())
        states = {**given, self._kind.states: last.made["states"]}
        if "text_embeds" in came:
            states["added_cond_kwargs"] = {**more, "text_embeds": last.made["text_embeds"]}
        return states, last.lacking

    def _scales(self, begun: Begun) -> Tensor:
        """Of each row of the call and each part, (B, parts); 0 for rows that are not to be corrected."""
        assert begun.call is not None
        made = torch.zeros(len(begun.call.sample), len(self.parts))
        for column, part in enumerate(self.parts.values()):
            made[begun.call.rows, column] = self._corrector.judged(part, begun)
        return made

    def _made(self, came: Mapping[str, Tensor], scales: Tensor) -> tuple[dict[str, Tensor], Tensor, str]:
        """What the host is given instead, the rows of it that are other ones, and an encoder that knew no words."""
        own = {name: unpatched(tensor) for name, tensor in came.items()}
        made = {name: tensor.clone() for name, tensor in came.items()}
        changed, lacking = torch.zeros(len(scales), dtype=torch.bool), ""
        for row in scales.any(1).nonzero().flatten().tolist():
            if not own["states"][row].any():
                continue  # zeros stand for no words
            strengths = dict(zip(self.parts, scales[row].tolist(), strict=True))
            read = self._row({name: tensor[row] for name, tensor in own.items()}, strengths)
            if isinstance(read, str):
                lacking = read
                if not self._corrector.words.hooks:  # else it was counted when a gate asked for the words
                    self._corrector.stats.count(wordless_rows=1)
                continue
            changed[row] = True
            for name, new in read.items():
                made[name][row] = _beside(came[name][row], own[name][row], new)
        return {name: with_unpatched(tensor, own[name]) for name, tensor in made.items()}, changed, lacking

    def _row(self, row: Mapping[str, Tensor], strengths: Mapping[int, float]) -> dict[str, Tensor] | str:
        """One row's states as patched encoders make them; the name of one that knows them not."""
        made = dict(row)
        for each in self._encoders:
            scales = {number: strengths[number] for number in each.parts if strengths[number]}
            if not scales:
                continue
            states = each.exchanged(made["states"], scales)
            if states is None:
                return each.component
            made["states"] = states
            if each.is_pooled and row.get("text_embeds") is not None and row["text_embeds"].any():
                pooled = each.exchanged_pooled(row["text_embeds"], scales)
                if pooled is None:
                    return each.component
                made["text_embeds"] = pooled
        return made


def _beside(came: Tensor, own: Tensor, new: Tensor) -> Tensor:
    """`new` in place of `own`; where another patch has exchanged it too, what both change adds up."""
    return new if came is own or torch.equal(came, own) else came + (new - own)
